.PHONY: check docs format results study-check

check:
	ruff check .
	ruff format --check .
	mypy
	OMP_NUM_THREADS=1 python -m pytest -q -n logical --dist worksteal

docs: # into site/, warnings are errors
	python docs/generate.py
	zensical build --clean --strict

results: # every published report and figure again, from their rows
	python results/draw.py

study-check: # a small part of the published study again, compared
	python benchmarks/study_check.py

format:
	ruff check --fix .
	ruff format .
