import subprocess
import sys


def test_a_recipe_needs_no_torch() -> None:
    code = "import sys, dsv3.recipe.schema, dsv3.recipe.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
