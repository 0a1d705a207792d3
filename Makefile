.PHONY: check docs format

check:
	ruff check .
	ruff format --check .
	mypy
	python -m pytest -q

docs: # into site/, warnings are errors
	python docs/generate.py
	zensical build --clean --strict

format:
	ruff check --fix .
	ruff format .
