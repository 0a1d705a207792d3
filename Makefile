.PHONY: check check-all lint docs format results study-check

check: lint # the tests without those of tests/slow.txt
	python -m pytest -q

check-all: lint # what CI runs
	python -m pytest -q -m ""

lint:
	ruff check .
	ruff format --check .
	mypy

docs: # into site/, warnings are errors
	python docs/generate.py
	zensical build --clean --strict

results: # every published report and figure again, from their rows
	python results/draw.py
	python study/figure.py

study-check: # a small part of the published study again, compared
	python study/check.py

format:
	ruff check --fix .
	ruff format .
