# The pictures of docs/schedules.md; a test fails when they are not those of the code.
.PHONY: schedules-docs
schedules-docs: $(VENV)/installed
	$(RUN)/python docs/schedules/draw.py
