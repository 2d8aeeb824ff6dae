# The Metal backend, on Linux: see docs/metal.md. Included by the Makefile.
.PHONY: metal-check metal-check-if-possible mac-wheel

metal-check: $(VENV)/tools $(VENV)/installed
	PYTHON=$(RUN)/python tools/metal_check.sh $(SPLIT)

metal-check-if-possible:
	@if command -v clang++-19 > /dev/null; then $(MAKE) metal-check; else \
	  echo "METAL IS NOT CHECKED: CLANG++-19 IS NOT INSTALLED"; fi # pytest's summary says it again

mac-wheel: $(VENV)/tools
	PYTHON=$(RUN)/python tools/mac_wheel.sh
	$(RUN)/python -m pytest -q tests/test_mac_wheel.py
