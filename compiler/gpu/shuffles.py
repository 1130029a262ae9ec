"""Values from lane to lane of a warp."""

from __future__ import annotations

from .ir import Code, Value


def access_of(value: Value) -> str:
    return {"i64": "b64", "float": "f32", "double": "f64"}.get(value.type, "b32")


def shuffled(code: Code, value: Value, step: int) -> Value:
    """The value of the lane whose number differs in one bit."""
    if value.type == "i1":
        return shuffled(code, value.to("zext", "i32"), step).compare("ne", 0)
    if value.type in ("i64", "double"):
        low, high = code.fresh("i32"), code.fresh("i32")
        code.write("mov.b64", f"{{{low.text}, {high.text}}}", code_held(code, value))
        low, high = shuffled(code, low, step), shuffled(code, high, step)
        result = code.fresh(value.type)
        code.write("mov.b64", result, f"{{{low.text}, {high.text}}}")
        return result
    result = code.fresh(value.type)
    held = code_held(code, value)
    code.line(f"shfl.sync.bfly.b32 {result.text}, {held.text}, {step}, 31, 0xffffffff;")
    return result


def code_held(code: Code, value: Value) -> Value:
    """The value in a register."""
    return value if value.text[0] == "%" else code.variable(value.type, value)
