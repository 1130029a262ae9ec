"""A pipeline's call from Python as native code.

`sf_call(self, args, count, names)` is a method in CPython's convention `METH_FASTCALL |
METH_KEYWORDS`. It takes the usual call without running any Python: `pipeline(x=..., y=...)` with
arrays of NumPy's that suit as they are, of shapes seen before. It checks names, dtypes, layout and
shapes, makes the arrays of the results, writes all addresses to the argument slots and enters
`sf_run` without Python's lock. Whatever else there is goes to the method `_in_python` of `self`.

The code knows no pipeline and is the same in each plan. The runtime writes to `sf_api` once what
`call_abi.API` names. The attribute `_table` of `self` is the address of a `TABLE`, or 0; it leads
to one record for each input, result and combination of shapes.

A table serves one call at a time: `busy` changes only under Python's lock. After a run that left
a status, or during which the table lost its buckets, the method `_after` is called. With a status
the call is done again in Python, which raises what the status means.

Sources: CPython's C API, Common Object Structures (`PyMethodDef`, `PyObject`) and Call Protocol;
NumPy's C API, Python Types and C-Structures (`PyArrayObject_fields`) and Array API (`PyArray_Empty`
takes over a reference to the dtype).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stagefuse.compiler.call_abi import API, ARRAY, BUCKET, DENSE, INPUT, MOST, RESULT, TABLE

from .ir import Code, Operand, Value


def calls_text() -> str:
    """The text of the module."""
    functions = (_in_python, _after, _suit, _seen, _made, _run, _call)
    head = f"@sf_api = dso_local global [{len(API)} x ptr] zeroinitializer, align 8"
    return "\n\n".join([head, *(write() for write in functions)]) + "\n"


class _Function(Code):
    """A function of pointers and words; `returns` is the type of its result.

    Counters and lists are in memory of its own until LLVM puts them in registers.
    """

    def __init__(self, name: str, returns: str, *parameters: str) -> None:
        super().__init__()
        self.returns = returns
        linkage = "" if name == "sf_call" else "internal "
        listed = ", ".join(f"{'i64' if p == 'count' else 'ptr'} %{p}" for p in parameters)
        self.head = f"define {linkage}{returns} @{name}({listed}) nounwind {{"
        self.own: list[str] = []

    def finished(self) -> str:
        if self.lines[-1].endswith(":"):
            self.line("unreachable")
        return "\n".join([self.head, "entry:", *self.own, *self.lines, "}"])

    def given(self, *names: str) -> list[Value]:
        return [self.value(f"%{name}", "i64" if name == "count" else "ptr") for name in names]

    def words(self, count: int = 1) -> Value:
        """Words of its own."""
        name = self.fresh("own")
        self.own.append(f"  {name} = alloca [{count} x i64], align 8")
        return self.value(name, "ptr")

    def at(self, start: Value, number: Operand, size: int = 8) -> Value:
        """The address of one of equal records in a row."""
        place = self.operand(number, "i64") * size
        return self.emit(f"getelementptr i8, ptr {start.text}, i64 {place.text}", "ptr")

    def load(self, address: Value, type: str = "ptr") -> Value:
        return self.emit(f"load {type}, ptr {address.text}", type)

    def store(self, address: Value, value: Operand) -> None:
        word = self.operand(value, "i64")
        self.line(f"store {word.listed_text}, ptr {address.text}, align 8")

    def field(
        self, names: tuple[str, ...], record: Value, name: str, type: str = "i64"
    ) -> Value:
        return self.load(self.at(record, names.index(name)), type)

    def array(self, array: Value, name: str, type: str = "ptr") -> Value:
        """A field of an array object."""
        found = self.load(self.at(array, ARRAY[name], 1), type)
        return found.to("sext", "i64") if type == "i32" else found

    def api(self, name: str) -> Value:
        return self.load(self.at(self.value("@sf_api", "ptr"), API.index(name)))

    def enter(self, function: Value, *args: Value, returns: str = "ptr") -> Value:
        """A call of what lies at an address; nobody may use what a void one gives."""
        passed = ", ".join(a.listed_text for a in args)
        text = f"call {returns} {function.text}({passed})"
        if returns == "void":
            self.line(text)
            return self.null
        return self.emit(text, returns)

    def ask(self, name: str, *args: Value, returns: str = "ptr") -> Value:
        """A call of CPython or NumPy."""
        return self.enter(self.api(name), *args, returns=returns)

    def part(self, name: str, *args: Value, returns: str = "i1") -> Value:
        """A call of another function here."""
        return self.enter(self.value(f"@{name}", "ptr"), *args, returns=returns)

    def drop(self, objects: Value, count: Value) -> None:
        """Let go of objects in a row."""
        with self.each(count) as number:
            self.ask("Py_DecRef", self.load(self.at(objects, number)), returns="void")

    @property
    def null(self) -> Value:
        return self.value("null", "ptr")

    def missing(self, address: Value) -> Value:
        return address.compare("eq", self.null)

    def give(self, value: Operand) -> None:
        """Return; what is written after it in the same place is never reached."""
        self.line(f"ret {self.operand(value, self.returns).listed_text}")
        self.start(self.label("after"))

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        yes, no = self.label("when"), self.label("on")
        self.branch_if(condition, yes, no)
        self.start(yes)
        with self.scope():
            yield
        self.branch(no)
        self.start(no)

    @contextmanager
    def each(self, count: Value) -> Iterator[Value]:
        """For each number below a count."""
        counter = self.words()
        test, body, end = self.label("test"), self.label("body"), self.label("end")
        self.store(counter, 0)
        self.branch(test)
        self.start(test)
        number = self.load(counter, "i64")
        self.branch_if(number.compare("lt", count), body, end)
        self.start(body)
        with self.scope():
            yield number
            self.store(counter, number + 1)
        self.branch(test)
        self.start(end)


def _in_python() -> str:
    """The call as it came, done by `self._in_python`."""
    f = _Function("sf.in_python", "ptr", "self", "args", "count", "names")
    this, args, count, names = f.given("self", "args", "count", "names")
    method = f.ask("PyObject_GetAttr", this, f.api("_in_python"))
    with f.when(f.missing(method)):
        f.give(f.null)
    result = f.ask("PyObject_Vectorcall", method, args, count, names)
    f.ask("Py_DecRef", method, returns="void")
    f.give(result)
    return f.finished()


def _after() -> str:
    """Whether `self._after()` worked."""
    f = _Function("sf.after", "i1", "self")
    (this,) = f.given("self")
    method = f.ask("PyObject_GetAttr", this, f.api("_after"))
    with f.when(f.missing(method)):
        f.give(0)
    result = f.ask("PyObject_Vectorcall", method, f.null, f.const(0, "i64"), f.null)
    f.ask("Py_DecRef", method, returns="void")
    with f.when(f.missing(result)):
        f.give(0)
    f.ask("Py_DecRef", result, returns="void")
    f.give(1)
    return f.finished()


def _suit() -> str:
    """Whether arguments are arrays as kernels take them; writes them to `objects`, in order."""
    f = _Function("sf.suit", "i1", "table", "args", "names", "objects")
    table, args, names, objects = f.given("table", "args", "names", "objects")
    records, inputs = f.field(TABLE, table, "input", "ptr"), f.field(TABLE, table, "inputs")
    place = f.words()
    with f.each(inputs) as number:
        record = f.at(records, number, 8 * len(INPUT))
        name = f.field(INPUT, record, "name", "ptr")
        f.store(place, number)
        with f.when(f.ask("PyTuple_GetItem", names, number).compare("ne", name)):
            f.store(place, -1)
            with f.each(inputs) as other:
                with f.when(f.ask("PyTuple_GetItem", names, other).compare("eq", name)):
                    f.store(place, other)
            with f.when(f.load(place, "i64").compare("lt", 0)):
                f.give(0)
        array = f.load(f.at(args, f.load(place, "i64")))
        with f.when(f.array(array, "type").compare("ne", f.api("ndarray"))):
            f.give(0)
        other_type = f.array(array, "dtype").compare("ne", f.field(INPUT, record, "dtype", "ptr"))
        other_rank = f.array(array, "rank", "i32").compare("ne", f.field(INPUT, record, "rank"))
        sparse = (f.array(array, "flags", "i32") & DENSE).compare("ne", DENSE)
        with f.when(other_type | other_rank | sparse):
            f.give(0)
        f.store(f.at(objects, number), array)
    f.give(1)
    return f.finished()


def _seen() -> str:
    """The record for the shapes of the inputs in `objects`, or null."""
    f = _Function("sf.seen", "ptr", "table", "objects")
    table, objects = f.given("table", "objects")
    inputs, buckets = f.field(TABLE, table, "inputs"), f.field(TABLE, table, "buckets")
    records, first = f.field(TABLE, table, "input", "ptr"), f.field(TABLE, table, "bucket", "ptr")
    done, same = f.words(), f.words()
    with f.each(buckets) as number:
        bucket = f.load(f.at(first, number))
        wanted = f.field(BUCKET, bucket, "shapes", "ptr")
        f.store(done, 0)
        f.store(same, 1)
        with f.each(inputs) as i:
            shape = f.array(f.load(f.at(objects, i)), "shape")
            rank = f.field(INPUT, f.at(records, i, 8 * len(INPUT)), "rank")
            with f.each(rank) as axis:
                extent = f.load(f.at(wanted, f.load(done, "i64") + axis), "i64")
                with f.when(f.load(f.at(shape, axis), "i64").compare("ne", extent)):
                    f.store(same, 0)
            f.store(done, f.load(done, "i64") + rank)
        with f.when(f.load(same, "i64").compare("ne", 0)):
            f.give(bucket)
    f.give(f.null)
    return f.finished()


def _made() -> str:
    """Whether there are new arrays for the results, written to `objects`."""
    f = _Function("sf.made", "i1", "table", "bucket", "objects")
    table, bucket, objects = f.given("table", "bucket", "objects")
    records, count = f.field(TABLE, table, "result", "ptr"), f.field(TABLE, table, "results")
    shapes = f.field(BUCKET, bucket, "result shapes", "ptr")
    makers = f.field(BUCKET, bucket, "makers", "ptr")
    done, place = f.words(), f.words()
    f.store(done, 0)
    with f.each(count) as number:
        record = f.at(records, number, 8 * len(RESULT))
        dtype, rank = f.field(RESULT, record, "dtype", "ptr"), f.field(RESULT, record, "rank")
        maker = f.load(f.at(makers, number))
        with f.when(f.missing(maker)):
            f.ask("Py_IncRef", dtype, returns="void")
            shape, order = f.at(shapes, f.load(done, "i64")), f.const(0, "i32")
            new = f.ask("PyArray_Empty", rank.to("trunc", "i32"), shape, dtype, order)
            f.store(place, new)
            with f.when(f.missing(new)):
                f.ask("PyErr_Clear", returns="void")  # Python says what lacks memory
        with f.when(maker.compare("ne", f.null)):
            none = f.const(0, "i64")
            f.store(place, f.ask("PyObject_Vectorcall", maker, f.null, none, f.null))
        array = f.load(place)
        with f.when(f.missing(array)):
            f.drop(objects, number)
            f.give(0)
        f.store(f.at(objects, number), array)
        f.store(done, f.load(done, "i64") + rank)
    f.give(1)
    return f.finished()


def _run() -> str:
    """Runs the steps of a bucket on the elements of `objects`."""
    f = _Function("sf.enter", "void", "table", "bucket", "objects")
    table, bucket, objects = f.given("table", "bucket", "objects")
    pairs = f.field(BUCKET, bucket, "place", "ptr")
    with f.each(f.field(BUCKET, bucket, "places")) as number:
        pair = f.at(pairs, number, 16)
        array = f.load(f.at(objects, f.load(pair, "i64")))
        f.store(f.load(f.at(pair, 1)), f.array(array, "elements"))
    thread = f.ask("PyEval_SaveThread")
    steps = [f.field(BUCKET, bucket, name) for name in ("steps", "count")]
    run = f.field(TABLE, table, "run", "ptr")
    f.enter(run, *steps, f.field(TABLE, table, "threads"), returns="i64")
    f.ask("PyEval_RestoreThread", thread, returns="void")
    f.line("ret void")
    return f.finished()


def _call() -> str:
    """The method."""
    f = _Function("sf_call", "ptr", "self", "args", "count", "names")
    whole = this, args, count, names = f.given("self", "args", "count", "names")
    objects = f.words(MOST)

    def only_if(condition: Value) -> None:
        with f.when(condition.compare("eq", 0)):
            f.give(f.part("sf.in_python", *whole, returns="ptr"))

    address = f.ask("PyObject_GetAttr", this, f.api("_table"))
    with f.when(f.missing(address)):
        f.give(f.null)
    table = f.ask("PyLong_AsVoidPtr", address)
    f.ask("Py_DecRef", address, returns="void")
    only_if(table.compare("ne", f.null) & names.compare("ne", f.null) & count.compare("eq", 0))
    inputs, results = f.field(TABLE, table, "inputs"), f.field(TABLE, table, "results")
    class_ = f.field(TABLE, table, "tuple", "ptr")
    only_if(f.field(TABLE, table, "busy").compare("eq", 0))
    only_if(f.ask("PyTuple_Size", names, returns="i64").compare("eq", inputs))
    only_if(f.part("sf.suit", table, args, names, objects))
    bucket = f.part("sf.seen", table, objects, returns="ptr")
    only_if(bucket.compare("ne", f.null))
    made, busy = f.at(objects, inputs), f.at(table, TABLE.index("busy"))
    f.store(busy, 1)  # what makes results may be Python, during which other threads run
    with f.when(f.part("sf.made", table, bucket, made).compare("eq", 0)):
        f.store(busy, 0)
        with f.when(f.ask("PyErr_Occurred").compare("ne", f.null)):
            f.give(f.null)
        f.give(f.part("sf.in_python", *whole, returns="ptr"))
    f.part("sf.enter", table, bucket, objects, returns="void")
    f.store(busy, 0)
    failed = f.load(f.field(BUCKET, bucket, "status", "ptr"), "i64").compare("ne", 0)
    with f.when(failed | f.field(TABLE, table, "buckets").compare("eq", 0)):
        ended = f.part("sf.after", this)
        with f.when(failed | ended.compare("eq", 0)):
            f.drop(made, results)
            only_if(ended.compare("eq", 0))
            f.give(f.null)
    with f.when(f.missing(class_)):
        f.give(f.load(made))
    value = f.ask("PyObject_Vectorcall", class_, made, results, f.null)
    f.drop(made, results)
    f.give(value)
    return f.finished()
