# make prepare          export the modules, clean the notebooks, write the generated files, check the style
# make test             run all notebooks, then all tests, two at a time
# make test FILE=tap    run the notebooks and the test files with "tap" in their name
# make ci               run everything that a change must pass, in new environments

FILE ?=
notebooks := $(if $(FILE),$(notdir $(wildcard nbs/*$(FILE)*.ipynb)))
tests := $(if $(FILE),$(wildcard tests/test_*$(FILE)*.py))

.PHONY: help prepare test ci

help:
	@sed -n 's/^# //p' Makefile

prepare:
	nbdev_export
	nbdev_clean
	python .ci/readme.py
	python .ci/llms.py
	python .ci/api.py
	python .ci/widgets.py
	python .ci/colab.py
	python .ci/check_notebooks.py
	python .ci/lint

test:
ifeq ($(FILE),)
	nbdev_test
	pytest -n 2 --dist worksteal
else ifeq ($(notebooks)$(tests),)
	@echo "no notebook and no test file has '$(FILE)' in its name"; exit 1
else
	$(if $(notebooks),nbdev_test --file_re '.*$(FILE).*')
	$(if $(tests),pytest $(tests))
endif

ci:
	bash .ci/run
