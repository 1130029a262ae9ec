"""The syntax tree to PTX text. `read_module(print_module(m)) == m`, but for comments."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from math import prod

from . import syntax as s

_INDENT = "    "


def print_module(module: s.Module) -> str:
    """The text of a module."""
    major, minor = module.version
    lines = [*(f"// {text}" for text in module.comments)]
    lines += [f".version {major}.{minor}", f".target {', '.join(module.target)}"]
    lines += [f".address_size {module.address_size}", ""]
    lines += [f'.file {number} "{name}"' for number, name in module.files]
    # declarations come first: initial values of variables may be addresses of what they declare
    declared = list(takewhile(lambda f: f.body is None, module.functions))
    for function in declared:
        lines += [*_function(function), ""]
    lines += [f"{_variable(v)};" for v in module.variables]
    for function in module.functions[len(declared) :]:
        lines += ["", *_function(function)]
    lines += [f".alias {name}, {target};" for name, target in module.aliases]
    for section in module.sections:
        lines += ["", f".section .{section.name}", "{", section.text, "}"]
    return "\n".join(lines) + "\n"


def _function(function: s.Function) -> Iterator[str]:
    head = [*(f".{x}" for x in function.linkage), ".entry" if function.is_entry else ".func"]
    if function.results:
        head.append(f"({', '.join(map(_variable, function.results))})")
    head.append(function.name)
    if function.parameters:
        head.append("(")
        yield " ".join(head)
        yield ",\n".join(_INDENT + _variable(p) for p in function.parameters)
        yield ")"
    else:
        yield " ".join((*head, "()"))
    for name, values in function.directives:
        if name == "pragma":
            yield f".pragma {_strings(values)};"
        else:
            yield f".{name} {', '.join(map(str, values))}".rstrip()
    if function.body is None:
        yield ";"
        return
    yield "{"
    yield from _statements(function.body, _INDENT)
    yield "}"


def _statements(body: tuple[s.Statement, ...], indent: str) -> Iterator[str]:
    for x in body:
        match x:
            case s.Label(name):
                yield f"{indent[:-4]}{name}:"
            case s.Scope(inner):
                yield f"{indent}{{"
                yield from _statements(inner, indent + _INDENT)
                yield f"{indent}}}"
            case s.Comment(text):
                yield f"{indent}// {text}"
            case _:
                yield indent + _statement(x)


def _statement(x: s.Statement) -> str:
    match x:
        case s.Instruction():
            return print_instruction(x)
        case s.Registers(kind, names):
            text = ", ".join(n if count is None else f"{n}<{count}>" for n, count in names)
            return f".reg .{kind} {text};"
        case s.Variable():
            return f"{_variable(x)};"
        case s.Loc(file, line, column, inlined):
            return f".loc {file} {line} {column}{', ' if inlined else ''}{inlined}"
        case s.Pragma(texts):
            return f".pragma {_strings(texts)};"
        case s.Targets(name, kind, labels):
            return f"{name}: .{kind} {', '.join(labels)};"
        case s.Prototype(name, results, parameters, noreturn):
            tail = " .noreturn" if noreturn else ""
            first = f"({', '.join(map(_variable, results))}) " if results else ""
            rest = ", ".join(map(_variable, parameters))
            return f"{name}: .callprototype {first}_ ({rest}){tail};"
        case _:
            raise TypeError(type(x).__name__)


def _variable(v: s.Variable) -> str:
    words = [f".{x}" for x in v.linkage]
    if v.space:
        words.append(f".{v.space}")
    if v.align is not None:
        words.append(f".align {v.align}")
    if v.vector > 1:
        words.append(f".v{v.vector}")
    words.append(f".{v.type}")
    words += [x if x.isdigit() else f".{x}" for x in v.pointer]
    words.append(v.name + "".join(f"[{size or ''}]" for size in v.shape))
    text = " ".join(words)
    sizes = v.shape if v.vector == 1 else (*v.shape, v.vector)
    return f"{text} = {_initials(v.initial, sizes)}" if v.initial else text


def _initials(values: tuple[s.Initial, ...], sizes: tuple[int, ...]) -> str:
    if not sizes:
        return _initial(values[0])
    row = prod(sizes[1:])
    rows = (values[at : at + row] for at in range(0, len(values), row))
    return f"{{{', '.join(_initials(each, sizes[1:]) for each in rows)}}}"


def _initial(x: s.Initial) -> str:
    if isinstance(x, s.GenericOf):
        return f"generic({x.name}){_offset(x.offset)}"
    if isinstance(x, s.ByteOf):
        return f"0x{0xFF << 8 * x.number:X}({_initial(x.address)})"
    return print_operand(x)


def print_instruction(x: s.Instruction) -> str:
    """One instruction as text, without indentation."""
    guard = f"@{'!' if x.guard.negated else ''}{x.guard.register.name} " if x.guard else ""
    operands = ", ".join(map(print_operand, x.operands))
    return f"{guard}{x.name}{' ' if operands else ''}{operands};"


def print_operand(x: s.Operand) -> str:
    """One operand as text."""
    match x:
        case s.Register(name) | s.Special(name):
            return name
        case s.Symbol(name, offset):
            return name + _offset(offset)
        case s.Immediate(value):
            return str(value)
        case s.FloatImmediate(bits, width):
            return f"0f{bits:08X}" if width == 32 else f"0d{bits:016X}"
        case s.Negated(register):
            return f"!{register.name}"
        case s.Vector(elements):
            return f"{{{', '.join(map(print_operand, elements))}}}"
        case s.Pair(first, second):
            return f"{print_operand(first)}|{print_operand(second)}"
        case s.Sink():
            return "_"
        case s.Arguments(elements):
            return f"({', '.join(map(print_operand, elements))})"
        case s.Address(base, offset, coordinates):
            rest = ", ".join(map(print_operand, coordinates))
            tail = f", {{{rest}}}" if rest else ""
            return f"[{print_operand(base)}{_offset(offset)}{tail}]"


def _offset(offset: int) -> str:
    return f"+{offset}" if offset else ""  # `+-4`: the grammar has no other form for it


def _strings(texts: tuple[int | str, ...]) -> str:
    return ", ".join(f'"{text}"' for text in texts)
