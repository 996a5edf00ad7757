"""What a student is told: the first wrong tensor, the known mistake that gives the same, hints, and last the solution."""

from __future__ import annotations

from refimpl.learn.check import Grade
from refimpl.learn.exercise import Exercise

LINES = {
    "right": ("right: {total} values checked in {worlds}", "正确：在{worlds}中核对了 {total} 项"),
    "error": ("your code stopped{line}: {error}", "你的代码中断了{line}：{error}"),
    "line": (" in line {line}", "，在第 {line} 行"),
    "first": ("wrong: the first is {place}, in {world}", "有误：最先出错的是 {place}（{world}）"),
    "where": ("{where}: {got}, expected {expected}", "{where}：得到 {got}，应为 {expected}"),
    "outcome": ("{wrong} of {total} tensors are wrong in the whole run", "整个前向中，{total} 个张量有 {wrong} 个出错"),
    "answer": ("and the model still says {answer}", "而模型的回答是 {answer}"),
    "mistake": ("it looks like this: {says}", "看起来是这样：{says}"),
    "more": ("more help: --hint, then --hint --hint, then --solution", "还需要帮助：--hint，再 --hint --hint，最后 --solution"),
    "models": ("five prompts and batches of four models", "四个模型的多个提示与批次"),
    "cases": ("its cases", "各个用例"),
}  # fmt: skip


def verdict(exercise: Exercise, grade: Grade, printed: str, language: str, hints: int, solution: bool) -> str:
    """The lines of one check."""
    at = 0 if language == "en" else 1

    def say(key: str, **values: object) -> str:
        return LINES[key][at].format(**values)

    lines = [printed.rstrip()] if printed.strip() else []
    if grade.right:
        worlds = say("cases" if exercise.kind == "function" else "models")
        lines.append(say("right", total=grade.total, worlds=worlds))
    elif grade.error:
        lines.append(say("error", error=grade.error, line=say("line", line=grade.line) if grade.line else ""))
    else:
        lines.append(say("first", place=grade.place, world=grade.world))
        lines.append(say("where", where=grade.where or grade.place, got=grade.got, expected=grade.expected))
        if exercise.kind != "function":
            lines.append(say("outcome", wrong=grade.wrong, total=grade.total))
        if grade.answer == "李商隐":
            lines.append(say("answer", answer=grade.answer))
        known = next((one for one in exercise.mistakes if one.name == grade.mistake), None)
        if known is not None:
            lines.append(say("mistake", says=getattr(known.says, language)))
    lines += [f"{i}. {getattr(hint, language)}" for i, hint in enumerate(exercise.hints[:hints], 1)]
    if solution:
        lines += ["", exercise.source(exercise.solution).rstrip()]
    elif not grade.right and not hints:
        lines.append(say("more"))
    return "\n".join(lines)
