"""Every exercise: its starter is wrong where it says, its solution right, and each mistake is told from the others."""

import numpy as np
import pytest

import golden
import refimpl
from refimpl.cli import main
from refimpl.errors import InputError
from refimpl.learn import worker
from refimpl.learn.check import PROMPT, grade
from refimpl.learn.exercise import FOLDER, find, names
from refimpl.learn.mistakes import SABOTAGES

MISTAKES = [(name, mistake.name) for name in names() for mistake in find(name).mistakes]


@pytest.mark.parametrize("name", names())
def test_the_starter_is_wrong_where_it_says_and_the_solution_right(name):
    exercise = find(name)
    first = grade(exercise, exercise.starter)
    assert not first.right and not first.error and first.place == exercise.breaks
    assert grade(exercise, exercise.solution).right


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_mistake_is_diagnosed_as_what_it_is(name, mistake):
    exercise = find(name)
    (known,) = [one for one in exercise.mistakes if one.name == mistake]
    found = grade(exercise, known.function)
    assert not found.right and found.mistake == mistake


def written(file, text, name):
    """What a student's file defines under a name. The code is the repository's own, so it may run in this process."""
    file.write_text(text, encoding="utf-8")
    space: dict = {}
    exec(compile(text, str(file), "exec"), space)
    return space[find(name).function]


@pytest.mark.parametrize("name", names())
def test_what_a_student_gets_stands_alone(name, tmp_path):
    """The file runs with its own imports, begins red, and is green with the solution in it."""
    exercise, file = find(name), tmp_path / f"{name}.py"
    for language in ("en", "zh"):
        text = exercise.file(language)
        assert worker.exercise_of(text) == name
        assert grade(exercise, written(file, text, name)).place == exercise.breaks
    mistakes = exercise.mistakes[: 1 if exercise.kind == "method" else None]  # each takes a forward of several models
    for function, right in [(exercise.solution, True), *((one.function, False) for one in mistakes)]:
        text = f"import math\nimport numpy as np\n{exercise.source(function)}"
        found = grade(exercise, written(file, text, name))
        assert found.right is right and not found.error, found


@pytest.mark.parametrize("name", ["alibi_slopes", "rms_norm"])
def test_a_process_of_its_own_says_the_same(name, tmp_path):
    exercise, file = find(name), tmp_path / f"{name}.py"
    file.write_text(exercise.file("en"), encoding="utf-8")
    assert worker.run(name, str(file)).place == exercise.breaks
    file.write_text(f"import math\nimport numpy as np\n{exercise.source(exercise.solution)}", encoding="utf-8")
    assert worker.run(name, str(file)).right


def test_both_languages_are_there_and_the_files_are_on_the_map():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in names():
        exercise = find(name)
        said = [exercise.title, exercise.task, *exercise.hints, *(one.says for one in exercise.mistakes)]
        assert f"`{name}.py`" in listed
        assert all(any("\u4e00" <= letter <= "\u9fff" for letter in one.zh) for one in said), name


def test_five_sabotaged_models_answer_right_with_wrong_tensors():
    model = refimpl.load(backend="numpy")
    exact = model.trace(PROMPT, "float64")
    wrong = {}
    for name, sabotage in SABOTAGES.items():
        run = sabotage.of(model).trace(PROMPT, "float64")
        assert model.tokenizer.decode([int(np.argmax(run["lm_head"][0, -1]))]) == "李商隐"
        wrong[name] = len(golden.compare(run, exact).failures)
    assert wrong == {"no_rope": 50, "rope_sign": 50, "layer_norm": 53, "no_norm_head": 1, "relu": 40}


def test_start_and_check_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "mine.py"
    assert main(["learn", "start", "rope", "--out", str(file)]) == 0
    assert main(["learn", "check", str(file)]) == 1
    said = capsys.readouterr().out
    assert "model.layers.0.self_attn.query" in said and "token 1 ('鹳'), head 0" in said and "50 of 54" in said
    file.write_text("import numpy as np\n" + find("rope").source(find("rope").mistakes[0].function), encoding="utf-8")
    assert main(["learn", "check", str(file)]) == 2, "its name and its first line name no exercise"
    file.write_text("# exercise: rope\n" + find("rope").source(find("rope").solution), encoding="utf-8")
    assert main(["learn", "check", str(file)]) == 1
    assert "NameError" in capsys.readouterr().out
    text = "# exercise: rope\nimport numpy as np\n"
    file.write_text(text + find("rope").source(find("rope").mistakes[0].function), encoding="utf-8")
    assert main(["learn", "check", str(file), "--hint", "--language", "zh"]) == 1
    assert "相邻元素" in capsys.readouterr().out
    file.write_text(text + find("rope").source(find("rope").solution), encoding="utf-8")
    assert main(["learn", "check", str(file)]) == 0
    assert main(["learn", "start", "rope", "--out", str(file)]) == 2, "a file that is there is kept"
    assert main(["learn", "start", "ropes"]) == 2, "an exercise that nobody knows"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("while True: pass", "stopped|code -"),
        ("import numpy as np\nx = np.ones(1 << 33)", "MemoryError"),
        ("import os\nos._exit(3)", "code 3"),
        ("def rope(self, x, cos, sin):\n    return x[:, :, :3]", "ValueError|InputError"),
        ("def rope(", "SyntaxError"),
        ("x = 1", "defines no rope"),
    ],
)
def test_a_slip_ends_in_one_line(code, said, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "SECONDS", 2)
    file = tmp_path / "rope.py"
    file.write_text(code, encoding="utf-8")
    try:
        _, found, _ = worker.check(file)
        text = found.error
    except InputError as error:
        text = str(error)
    assert any(part in text for part in said.split("|")), text
