# The Metal backend, on Linux: see docs/metal.md. Included by the Makefile.
.PHONY: metal-check metal-mutants mac-wheel

metal-check: $(VENV)/installed
	PYTHON=$(RUN)/python tools/metal_check.sh

# Plants bugs, one after another, and asks that each is caught: some 15 minutes.
metal-mutants: $(VENV)/installed
	$(RUN)/python tests/metal_on_cpu/mutants.py $(ARGS)

mac-wheel: $(VENV)/tools
	PYTHON=$(RUN)/python tools/mac_wheel.sh
	$(RUN)/python -m pytest -q tests/test_mac_wheel.py
