.PHONY: check docs format study-check

check:
	ruff check .
	ruff format --check .
	mypy
	python -m pytest -q

docs: # into site/, warnings are errors
	python docs/generate.py
	zensical build --clean --strict

study-check: # a small part of the published study again, compared
	python benchmarks/study_check.py

format:
	ruff check --fix .
	ruff format .
