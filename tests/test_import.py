"""`import bsbr_pl` costs nothing: what it offers is imported when it is used, and rooms without torch start without."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bsbr_pl

ROOT = Path(__file__).parent.parent
BLOCKED = "import sys; sys.modules['torch'] = sys.modules['lightning'] = None; "


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_without_torch():
    code = "import bsbr_pl; print(bsbr_pl.__version__, 'BSBRModel' in dir(bsbr_pl))"
    assert run(BLOCKED + code) == f"{bsbr_pl.__version__} True\n"
    loaded = run("import bsbr_pl, sys; print('torch' in sys.modules, 'bsbr_pl.models' in sys.modules)")
    assert loaded == "False False\n"


@pytest.mark.parametrize("room", ["values", "results", "report", "evals.runs"])
def test_rooms_of_rows_import_without_torch(room):
    if not list((ROOT / "bsbr_pl").glob(f"{room.replace('.', '/')}*")):
        pytest.skip("is not there yet")
    run(BLOCKED + f"import bsbr_pl.{room}")


@pytest.mark.parametrize("name", bsbr_pl.__all__)
def test_every_public_name_is_there(name):
    namespace: dict[str, object] = {}
    exec(f"from bsbr_pl import {name}", namespace)
    assert namespace[name] is getattr(bsbr_pl, name)
    assert namespace[name].__module__ == ("bsbr_pl.evals.certificate" if name == "certify" else "bsbr_pl.models")
    declared = (ROOT / "bsbr_pl/__init__.py").read_text().split("if TYPE_CHECKING:")[1].split("__version__")[0]
    assert re.search(rf"(    |import ){name}\b", declared), "type checkers see it"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'bsbr_pl' has no attribute 'BSRB'$"):
        _ = bsbr_pl.BSRB
    with pytest.raises(ImportError, match="cannot import name 'BSRB'"):
        exec("from bsbr_pl import BSRB")
