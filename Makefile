.PHONY: check format

check:
	ruff check .
	ruff format --check .
	mypy
	python -m pytest -q

format:
	ruff check --fix .
	ruff format .
