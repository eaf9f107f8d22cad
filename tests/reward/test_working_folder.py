"""A function named `module:function` may be in the working folder, where it hides no library."""

import sys
from pathlib import Path

import datasets
import pytest

from pipeline.errors import UserError
from pipeline.reward.importing import import_function


def test_it_is_found_after_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console script, unlike `python -m`, does not search the folder."""
    (tmp_path / "my_rewards_0.py").write_text("def gold(prompts, completions, **columns): return [0.5]")
    (tmp_path / "datasets.py").write_text("def load_from_disk(path): return 'hidden'")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(UserError, match="in the working folder or on the Python path"):
        import_function("my_rewards_0:gold")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards_0", raising=False)
    assert import_function("my_rewards_0:gold")(["q"], ["a"]) == [0.5]
    assert import_function("datasets:load_from_disk") is datasets.load_from_disk
    assert sys.path[-1] == str(tmp_path)
    import_function("my_rewards_0:gold")
    assert sys.path.count(str(tmp_path)) == 1
