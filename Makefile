.PHONY: check docs format study-check

check:
	ruff check .
	ruff format --check .
	mypy
	OMP_NUM_THREADS=1 python -m pytest -q -n logical --dist worksteal

docs: # into site/, warnings are errors
	python docs/generate.py
	zensical build --clean --strict

study-check: # a small part of the published study again, compared
	python study/check.py

format:
	ruff check --fix .
	ruff format .
