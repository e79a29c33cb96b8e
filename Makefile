# make prepare          the modules, README.md and CONTRIBUTING.md in step with the notebooks, and the style of the code
# make test             all notebooks, then all tests, two at a time
# make test FILE=03     the notebooks whose name begins with 03, as tests
# make test FILE=tap    the notebooks and the test files that have "tap" in their name
# make ci               everything that a change must pass, in new environments

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
	python .ci/check_notebooks.py
	python .ci/lint

test:
ifeq ($(FILE),)
	nbdev_test
	pytest -n 2 --dist loadfile
else ifeq ($(notebooks)$(tests),)
	@echo "no notebook and no test file has '$(FILE)' in its name"; exit 1
else
	$(if $(notebooks),nbdev_test --file_re '.*$(FILE).*')
	$(if $(tests),pytest $(tests))
endif

ci:
	bash .ci/run
