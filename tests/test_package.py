import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import armhubert
from armhubert import kernels

FOR_THE_COMMAND_LINE = {"plan.py": "# armhubert distill DATA --config "}
"""Text by file that is read beside the command line: the head of a configuration that `armhubert plan` writes."""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_but_the_triton_implementations_works_where_triton_is_missing():
    run(
        """
        import sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Block())
        import torch
        from armhubert import ARMHuBERT, ArmhubertError
        from armhubert.config import preset
        import armhubert.cli, armhubert.distill
        model = ARMHuBERT(preset("mini"))
        output = model(torch.randn(1, 4000))
        output.last_hidden_state.sum().backward()
        assert "triton" not in sys.modules
        try:
            ARMHuBERT(preset("mini"), impl="triton")(torch.randn(1, 4000))
        except ValueError as error:
            assert "triton" in str(error)
        else:
            raise AssertionError("impl='triton' fell back silently")
        """
    )


def test_importing_the_package_stays_light():
    out = run(
        """
        import sys, armhubert
        heavy = ["triton", "torchaudio", "transformers", "matplotlib", "tensorboard", "rich", "typer", "soundfile"]
        print([name for name in heavy if name in sys.modules])
        """
    )
    assert out.strip() == "[]"


def test_loading_a_model_does_not_import_pytorchs_compiler(tmp_path):
    out = run(
        f"""
        import sys, torch
        from armhubert import ARMHuBERT
        from armhubert.config import preset
        ARMHuBERT(preset("mini")).save_pretrained({str(tmp_path)!r})
        before = set(sys.modules)
        ARMHuBERT.from_pretrained({str(tmp_path)!r})
        print([name for name in ("torch._dynamo", "sympy", "torch.export") if name in set(sys.modules) - before])
        print("torch._dynamo" in before)
        """
    )
    assert out.split() == ["[]", "False"]


def test_help_does_not_wait_for_pytorch():
    out = run(
        """
        import sys
        from typer.testing import CliRunner
        from armhubert.cli.app import app
        for command in ([], ["distill"], ["evaluate"], ["profile"], ["plan"], ["extract"], ["export"], ["convert"],
                        ["info"]):
            assert CliRunner().invoke(app, [*command, "--help"]).exit_code == 0, command
        print("torch" in sys.modules)
        """
    )
    assert out.strip() == "False"


@pytest.mark.parametrize("package", [armhubert, kernels], ids=lambda package: package.__name__)
def test_messages_of_the_library_name_settings_not_options(package):
    options = []
    for path in Path(package.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
                text = node.value.replace(FOR_THE_COMMAND_LINE.get(path.name, "\0"), "")
                options += [(path.name, found) for found in re.findall(r"(?:^| )--[a-z]\S*", text)]
    assert options == []


def test_names_of_the_package_come_at_their_first_use():
    out = run(
        """
        import armhubert
        from armhubert import *
        import inspect
        assert set(armhubert.__all__) <= set(dir(armhubert))
        assert inspect.isclass(armhubert.ARMHuBERT) and armhubert.load_teacher is load_teacher
        try:
            armhubert.nothing
        except AttributeError as error:
            print(error)
        """
    )
    assert out.strip() == "module 'armhubert' has no attribute 'nothing'"


def test_the_command_line_is_reachable_as_a_module_and_prints_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "armhubert.cli", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "armhubert")
