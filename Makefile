# `make study` and `make test` on a fresh machine need Python 3.11 or later, make and pip's registry.
PYTHON ?= python3
TIER ?= demo
CORES ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
VENV := .venv
BIN := $(VENV)/bin
# nbval must find the same kernel, and cell output must not depend on the terminal.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# The study's package lies beside the notebooks; the kernels of the notebooks find it there.
export PYTHONPATH := $(CURDIR)/notebooks
export PYTHONWARNINGS := ignore::DeprecationWarning
export JUPYTER_PLATFORM_DIRS := 1
# File of your own networks, for backbones such as my_networks:segformer; see notebook A3.
export LSGS_NETWORKS := $(NETWORKS)

.PHONY: study book networks reproduce test test-slow bench map data-check lab format outputs lock clean

# Python compiles what it imports, once: to compile all that is installed takes a minute and a half.
unexport PYTHONDONTWRITEBYTECODE
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

study: $(VENV)/installed
	$(BIN)/python -m study run $(TIER) --cores $(CORES) $(if $(PROFILE),--profile $(PROFILE))

# The executed notebooks of a tier with their figures, and a site of them: work/book/index.html.
# Those of the demo are committed, with a map of its scene and the study of all scenes.
# Which sensors the maps do without is in a variable: a comma within $(if) would end its part.
BOOK_MISSING := none,NIR
book: $(VENV)/installed
	$(if $(filter demo,$(TIER)),$(RUN_NOTEBOOK) notebooks/06_mapping.ipynb \
		work/demo/notebooks/06_mapping.ipynb -p work ../work/demo -p missing $(BOOK_MISSING))
	$(if $(filter demo,$(TIER)),$(RUN_NOTEBOOK) notebooks/07_all_scenes.ipynb \
		work/demo/notebooks/07_all_scenes.ipynb -p work ../work/demo -p resamples 4000)
	$(BIN)/python -m study.workflow.book $(TIER) $(if $(filter demo,$(TIER)),results/book,work/$(TIER)/book)

# The committed networks again, from the download on, into results/networks.
networks: $(VENV)/installed
	$(BIN)/python -m study networks scratch --cores $(CORES)

# One committed result again, from the download on: make reproduce RUN=demo/cmx/lsgs/0/0
reproduce: $(VENV)/installed
	$(BIN)/python -m study reproduce $(TIER) --cores $(CORES) $(if $(RUN),--run $(RUN))

NBVAL := $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=300 \
	--nbval-sanitize-with=tests/nbval.cfg
test: $(VENV)/installed
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile
	rm -rf work/smoke # nbval runs the notebooks in order, in a fresh folder
	$(NBVAL) notebooks/01*.ipynb
	$(NBVAL) notebooks/0[2-57]*.ipynb & $(NBVAL) notebooks/06*.ipynb notebooks/A*.ipynb; \
		others=$$?; wait $$! && exit $$others

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# Times and memory of this machine, at the paper's size: about an hour on one CPU core (CORES=1).
# DEVICE=cuda times a GPU, and writes results/benchmarks_gpu.
BENCH := work/bench
DEVICE ?= cpu
RUN_NOTEBOOK := $(BIN)/python -m papermill --cwd notebooks --no-progress-bar --log-level WARNING
bench: $(VENV)/installed
	mkdir -p $(BENCH)
	$(RUN_NOTEBOOK) notebooks/01_data_preparation.ipynb $(BENCH)/01.ipynb -p work ../$(BENCH)/demo
	$(RUN_NOTEBOOK) notebooks/01_data_preparation.ipynb $(BENCH)/01-paper.ipynb -p work ../$(BENCH)/paper \
		-p patch_size 128 -p patch_stride 32 -p block_size 256 -p validation_blocks 2
	$(RUN_NOTEBOOK) notebooks/A2_speed.ipynb $(BENCH)/A2.ipynb -p work ../$(BENCH)/demo \
		-p paper_work ../$(BENCH)/paper -p preset paper -p device $(DEVICE) \
		-p results ../results/benchmarks$(if $(filter-out cpu,$(DEVICE)),_gpu) \
		-p patch_size 224 -p repeats 2 -p modalities 10 -p patches 5000 -p orders 20 \
		-p threads $(CORES)

# A scene mapped by a network, whatever sensors it has; DATASET is the entry of the manifest that the
# network learnt from, RAW the folder of the scene's files, named as there, MISSING names sensors to do
# without, RESAMPLE=1 brings other pixel sizes to that of the training:
# make map DATASET=demo RAW=other/folder WEIGHTS=results/networks/demo/cmx/fold0/seed0
MAPPED := $(or $(DATASET),demo)
WEIGHTS ?= results/networks/demo/cmx/fold0/seed0
map: $(VENV)/installed
	mkdir -p work/maps
	$(RUN_NOTEBOOK) --log-output --stdout-file - notebooks/06_mapping.ipynb work/maps/$(MAPPED).ipynb \
		-p work '$(CURDIR)/work' \
		-p dataset $(MAPPED) -p weights '$(abspath $(WEIGHTS))' $(if $(RAW),-p raw '$(abspath $(RAW))') \
		$(if $(MISSING),-p missing '$(MISSING)') $(if $(RESAMPLE),-p resample True) \
		$(if $(MANIFEST),-p manifest '$(abspath $(MANIFEST))')

# What is there of every data set, or of one: make data-check DATASET=potsdam RAW=where/it/is
data-check: $(VENV)/installed
	$(BIN)/python -m study.data.check $(if $(DATASET),--dataset $(DATASET)) $(if $(RAW),--raw '$(RAW)') \
		$(if $(MANIFEST),--manifest '$(MANIFEST)')

lab: $(VENV)/installed
	$(BIN)/jupyter lab notebooks

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Run the notebooks' smoke tier and keep the outputs of the checked cells, which nbval compares.
outputs: $(VENV)/installed
	rm -rf work/smoke
	$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace notebooks/*.ipynb
	$(BIN)/nbstripout --keep-count --extra-keys "metadata.language_info.version metadata.language_info" notebooks/*.ipynb

# Resolve the extras of pyproject.toml anew. CUDA builds and local versions are the installer's choice.
lock:
	rm -rf work/lock && $(PYTHON) -m venv work/lock
	work/lock/bin/python -m pip install --quiet '.[study,dev]'
	work/lock/bin/python -m pip freeze | sed 's/+[a-z0-9.]*$$//' \
		| grep -viE '^(lsgs-core|nvidia-|cuda-|triton)' > requirements.lock

clean:
	rm -rf work
