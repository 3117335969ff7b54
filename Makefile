# Two commands: `make demo` and `make test`. They need Python >= 3.11 and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all test-lowest models behind accuracy ways-out runtimes-more docs lint types readme clean

# One stamp per set of extras; made again when the dependencies change.
$(VENV)/.%: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing portnorm[$*] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/portnorm demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto -m "not slow"

# The heavy peers: torch, JAX, Dask, MLX and PaddlePaddle on the CPU, and the libraries whose weights are imported. speechbrain's recurrent layers need
# nothing of what the package asks for.
$(VENV)/.peers: $(VENV)/.test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check dask distributed jax flax keras onnxscript onnxslim
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check dm-haiku equinox "mlx[cpu]" orbax-checkpoint paddlepaddle thinc
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps speechbrain
	@touch $@

# Packages with trained weights, and nothing that they ask for.
$(VENV)/.models: $(VENV)/.peers docs/examples/real-models.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement docs/examples/real-models.txt
	@touch $@

# Each real model beside its own package.
models: $(VENV)/.models
	@for script in docs/examples/real_*.py; do $(BIN)/python $$script || exit 1; done

# What tools do with exported graphs (docs/behind-the-export.md), in an environment of their own, since they ask for versions of much else.
# One that cannot be installed is left out, and the table says so.
$(VENV)-tools/.installed: pyproject.toml
	@test -x $(VENV)-tools/bin/python || $(PYTHON) -m venv $(VENV)-tools
	@echo "installing into $(VENV)-tools"
	@$(VENV)-tools/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[onnx,fast]"
	@sed -n '/^tools = \[/,/^\]/s/^    "\([^"]*\)",/\1/p' pyproject.toml | grep -v '^portnorm' | while read -r tool; do \
		$(VENV)-tools/bin/python -m pip install --quiet --disable-pip-version-check "$$tool" || echo "$$tool is left out"; done
	@touch $@

behind: $(VENV)-tools/.installed
	PYTHONPATH=.:backends:onnx_export $(VENV)-tools/bin/python -m benchmarks.behind

# Who is right where the mean is large (docs/accuracy.md): every library of the field, those that do not go together in environments of their
# own. What cannot be installed is left out, and the page says so by name. (Later versions of onnx2tf ask for a NumPy before 2.)
# The environment of the tests is the last: of what others have too, such as torch, its versions are kept.
ACCURACY := tensorflow runtimes litert tvm iree
accuracy_tensorflow := tensorflow keras
accuracy_runtimes := MNN ncnn pnnx tinygrad opencv-python-headless>=5
accuracy_litert := tensorflow tf_keras onnx-graphsurgeon sng4onnx psutil onnx2tf==1.28.8 ai-edge-litert
accuracy_tvm := apache-tvm
accuracy_iree := iree-base-compiler[onnx] iree-base-runtime

$(VENV)-accuracy-%/.installed: pyproject.toml
	@test -x $(VENV)-accuracy-$*/bin/python || $(PYTHON) -m venv $(VENV)-accuracy-$*
	@echo "installing into $(VENV)-accuracy-$*"
	@$(VENV)-accuracy-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[onnx]"
	@for package in $(foreach package,$(accuracy_$*),"$(package)"); do \
		$(VENV)-accuracy-$*/bin/python -m pip install --quiet --disable-pip-version-check "$$package" || echo "$$package is left out"; done
	@touch $@

accuracy: $(VENV)/.peers $(VENV)/.runtimes $(ACCURACY:%=$(VENV)-accuracy-%/.installed)
	@for python in $(ACCURACY:%=$(VENV)-accuracy-%/bin/python) $(BIN)/python; do $$python -W ignore -m benchmarks.accuracy measure || exit 1; done
	$(BIN)/python -m benchmarks.accuracy draw
	$(BIN)/python -m benchmarks.readme

# Other ways out of Python than ONNX (docs/ways-out.md), in an environment of their own. One that cannot be installed is left out, and the
# table says so.
$(VENV)-ways/.installed: pyproject.toml
	@test -x $(VENV)-ways/bin/python || $(PYTHON) -m venv $(VENV)-ways
	@echo "installing into $(VENV)-ways"
	@$(VENV)-ways/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(VENV)-ways/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[onnx,torch,runtimes]" jax flatbuffers
	@for door in executorch litert-torch coremltools; do \
		$(VENV)-ways/bin/python -m pip install --quiet --disable-pip-version-check $$door torch==2.13.0 || echo "$$door is left out"; done
	@touch $@

# The gradients of onnxruntime are a package that takes the place of onnxruntime.
$(VENV)-ways-training/.installed: pyproject.toml
	@test -x $(VENV)-ways-training/bin/python || $(PYTHON) -m venv $(VENV)-ways-training
	@echo "installing into $(VENV)-ways-training"
	@$(VENV)-ways-training/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime-training-cpu onnx torch==2.13.0 \
		|| echo "onnxruntime-training is left out"
	@touch $@

ways-out: $(VENV)-ways/.installed $(VENV)-ways-training/.installed
	PYTHONPATH=.:backends:onnx_export $(VENV)-ways/bin/python -m benchmarks.ways_out
	PYTHONPATH=.:backends:onnx_export $(VENV)-ways/bin/python -W ignore -m benchmarks.ways_speed

# Runtimes that have a converter or a compiler of their own (docs/runtimes.md), each in an environment of its own: those of `accuracy`, and
# these. What cannot be installed is left out, and the table says so.
MORE := c openvino torch
more_c := emx-onnx-cgen
more_openvino := onnxruntime-openvino
more_torch := onnx2pytorch torch

$(VENV)-more-%/.installed: pyproject.toml
	@test -x $(VENV)-more-$*/bin/python || $(PYTHON) -m venv $(VENV)-more-$*
	@echo "installing into $(VENV)-more-$*"
	@for package in numpy onnx $(foreach package,$(more_$*),"$(package)"); do \
		$(VENV)-more-$*/bin/python -m pip install --quiet --disable-pip-version-check "$$package" || echo "$$package is left out"; done
	@touch $@

$(VENV)-more-node/.installed: pyproject.toml
	@mkdir -p $(VENV)-more-node
	@if command -v npm > /dev/null; then npm install --loglevel=error --no-audit --no-fund --ignore-scripts --prefix $(VENV)-more-node onnxruntime-node; \
		else echo "no npm: onnxruntime-node is left out"; fi
	@touch $@

runtimes-more: $(VENV)/.test $(patsubst %,$(VENV)-accuracy-%/.installed,runtimes litert tvm iree) $(patsubst %,$(VENV)-more-%/.installed,$(MORE) node)
	$(BIN)/python -m benchmarks.further
	$(BIN)/python -m benchmarks.further_steps
	$(BIN)/python docs/examples/deploy/everywhere.py
	$(BIN)/python -m benchmarks.readme

# Inference runtimes besides onnxruntime. onnxruntime-web needs npm, its page Chromium; the tests say what is not there.
$(VENV)/.runtimes: $(VENV)/.test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[runtimes]"
	@if command -v npm > /dev/null; then npm install --loglevel=error --no-audit --no-fund --prefix $(VENV)/web onnxruntime-web; else echo "no npm: onnxruntime-web is left out"; fi
	@touch $@

test-all: $(VENV)/.models $(VENV)/.runtimes
	$(BIN)/python -m pytest -n auto --peers --models --runtimes installed -m "$(if $(MARKS),($(MARKS)) and )not alone"
	$(BIN)/python -m pytest --peers --models --runtimes installed -m alone

# The oldest versions that pyproject.toml allows, in an environment of their own.
test-lowest: $(VENV)/.test
	@$(PYTHON) -m venv $(VENV)-lowest
	@$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct --editable ".[test]"
	$(VENV)-lowest/bin/python -m pytest -n auto -m "not slow"
	@$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct --editable ".[docs]"
	$(VENV)-lowest/bin/python $(SPHINX)

# The reference and the guides as a site that needs no network: out/docs/index.html. Every warning is an error, a link that leads nowhere too.
SITE := out/docs
SPHINX := -m sphinx --quiet --fresh-env --fail-on-warning --keep-going --doctree-dir out/doctrees docs $(SITE)

docs: $(VENV)/.docs
	$(BIN)/python $(SPHINX)
	@! grep -rnoE '<(script|link|img|iframe)[^>]*(src|href)="(https?:)?//[^"]*"' --include='*.html' $(SITE)
	@! grep -rnoE '(url\(|@import )["'"'"']?(https?:)?//' --include='*.css' $(SITE)
	@echo "$(SITE)/index.html"

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/mypy

readme: $(VENV)/.test
	$(BIN)/python -m benchmarks.readme

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-tools $(VENV)-ways $(VENV)-ways-training $(ACCURACY:%=$(VENV)-accuracy-%) \
		$(patsubst %,$(VENV)-more-%,$(MORE) node) out dist build
