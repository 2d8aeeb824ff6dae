"""The joined Metal source as C++: to check it, or to run its kernels on the CPU.

    python translate.py run JOINED.metal OUTPUT.cpp
    python translate.py check JOINED.metal

The text of the kernels stays as it is. What C++ cannot parse is read and taken out: the
explicit instantiations (they give the kernels' names), the attribute of a function
constant (it becomes a plain variable, and so do constants that depend on it) and memory
of a threadgroup (the harness has it). ``check`` has clang compile the source with distinct
address spaces, and applies rules of Metal that C++ does not have to clang's syntax tree.
Then it compiles for two GPUs that clang knows, where all that a thread has must be in
registers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
CLANG = "clang++-19"
LANGUAGE_VERSIONS = ("310", "320", "400")  # of macOS 14, 15 and 26

# Attributes of kernel arguments that are not buffers, as fields of Thread (grid.h).
BUILTINS = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
}

# A kernel's variable that its threadgroup shares: type, name, number of elements.
SHARED = r"\bthreadgroup (\w+) (\w+)\[([^\]]*)\];"
SHARED_TO_RUN = r'\1* \2 = metal_on_cpu::shared_memory<\1>("\2", \3);'
SHARED_TO_CHECK = r"extern threadgroup \1 \2[\3];"  # not on the stack, for clang


class Argument(NamedTuple):
    name: str
    attribute: str  # "buffer" or one of BUILTINS
    slot: str  # of a buffer: an expression
    present: str  # a function constant, or "" for always
    constant: bool  # its address space


class Translation(NamedTuple):
    text: str  # C++, without instantiations
    arguments: dict[str, list[Argument]]  # by kernel function
    instances: list[tuple[str, str]]  # host name, expression
    constants: dict[str, tuple[str, int]]  # function constants: type and index
    derived: dict[str, str]  # constants that depend on those, and their expressions
    cooperative: set[str]  # kernels whose threads share memory and may meet


def fail(message: str) -> None:
    sys.exit(f"[metal] {message}")


def preprocessed(path: Path, version: str) -> str:
    """The project's own macros expanded; those of <metal_stdlib> not: it is empty here."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "metal_stdlib").write_text("#pragma STDLIB\n")
        command = [CLANG, "-x", "c++", "-std=c++17", "-E", "-nostdinc", "-I", folder]
        command += [f"-D__METAL_VERSION__={version}", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parenthesised(text: str, start: int) -> str:
    """What is between the parenthesis at ``start`` and its partner."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return text[start + 1 : i]
    fail(f"a parenthesis is not closed: {text[start : start + 60]}")
    return ""


def argument(declaration: str, kernel: str) -> Argument:
    name = re.search(r"(\w+)\s*\[\[", declaration)
    attributes = re.search(r"\[\[(.*)\]\]", declaration, re.DOTALL)
    if not name or not attributes:
        fail(f"{kernel}: an argument without an attribute: {declaration.strip()}")
    parts = dict(re.findall(r"(\w+)(?:\(([^()]*)\))?", attributes[1]))
    kind = next((a for a in parts if a == "buffer" or a in BUILTINS), "")
    if not kind or parts.keys() - {kind, "function_constant"}:
        fail(f"{kernel}: the harness does not know the attributes of {declaration.strip()}")
    is_constant = "constant" in declaration.split("[[")[0].split()
    return Argument(name[1], kind, parts[kind], parts.get("function_constant", ""), is_constant)


def split_arguments(text: str) -> list[str]:
    """At commas outside of brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([<") - (character in ")]>")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def translated(text: str, shared: str, storage: str = "static ") -> Translation:
    """`shared` replaces the declarations of threadgroups' memory: see SHARED; `storage` is
    that of function constants."""
    arguments = {}
    for match in re.finditer(r"\[\[kernel\]\] void (\w+)\s*\(", text):
        declarations = split_arguments(parenthesised(text, match.end() - 1))
        arguments[match[1]] = [argument(d, match[1]) for d in declarations]

    instances: list[tuple[str, str]] = []

    def take_instance(match: re.Match[str]) -> str:
        name = "".join(re.findall(r'"([^"]*)"', match[1]))
        if match[2].replace(" ", "") != match[3].replace(" ", ""):
            fail(f"the instantiation of '{name}' names two kernels: {match[2]}, {match[3]}")
        instances.append((name, match[2]))
        return ""

    instantiation = (
        r"template \[\[host_name\(([^()]*)\)\]\] \[\[kernel\]\] decltype\(([^()]*)\) ([^;]*);"
    )
    text = re.sub(instantiation, take_instance, text)
    templates = {expression.partition("<")[0] for _, expression in instances}
    instances += [(kernel, kernel) for kernel in arguments if kernel not in templates]
    names = [name for name, _ in instances]
    if len(set(names)) != len(names):
        fail(f"a kernel name is used twice: {sorted(n for n in names if names.count(n) > 1)}")

    constants: dict[str, tuple[str, int]] = {}

    def take_constant(match: re.Match[str]) -> str:
        constants[match[2]] = (match[1], int(match[3]))
        return f"{storage}{match[1]} {match[2]};"

    text = re.sub(
        r"constant (bool|uint32_t) (\w+) \[\[function_constant\((\d+)\)\]\];", take_constant, text
    )
    derived: dict[str, str] = {}

    def take_derived(match: re.Match[str]) -> str:
        if not any(re.search(rf"\b{name}\b", match[2]) for name in (*constants, *derived)):
            return match[0]
        derived[match[1]] = match[2]
        return f"{storage}bool {match[1]};"

    text = re.sub(r"^constant bool (\w+) = ([^;]*);", take_derived, text, flags=re.MULTILINE)

    cooperative = set()
    for match in re.finditer(r"\[\[kernel\]\] void (\w+)\s*\(", text):
        body = text[match.end() : text.index("\n}\n", match.end())]
        if re.search(SHARED, body):
            cooperative.add(match[1])
    text = re.sub(SHARED, shared, text)
    # Off at the place where Metal reads it, in clang's words.
    text = text.replace("#pragma METAL fp contract(off)", "#pragma clang fp contract(off)")
    text = text.replace("#pragma METAL fp math_mode(safe)", "")
    text = text.replace("#pragma STDLIB", f'#include "{HERE}/include/metal_stdlib"')
    return Translation(text, arguments, instances, constants, derived, cooperative)


# ---- run -------------------------------------------------------------------------


def as_program(source: str, t: Translation) -> str:
    """The kernels, and a table of them (grid.h)."""
    lines = [f'#include "{HERE}/shared.h"', t.text, '# 1 "kernels_on_cpu.cpp"']
    lines += [
        f"#undef {word}" for word in ("device", "constant", "threadgroup", "thread", "float4")
    ]
    lines += [f'#include "{HERE}/{header}"' for header in ("bfloat.h", "grid.h")]
    lines.append("namespace metal_on_cpu {")
    for kernel, arguments in t.arguments.items():
        for number, (_, expression) in enumerate(t.instances):
            if expression.partition("<")[0] == kernel:
                lines.append(f"static Argument arguments_{number}[] = {{")
                for a in arguments:
                    present = f"&{a.present}" if a.present else "nullptr"
                    space = str(a.constant).lower()
                    slot = f"int({a.slot or -1})"
                    lines.append(
                        f'  {{"{a.name}", Kind::{a.attribute}, {slot}, {present}, {space}}},'
                    )
                lines.append("};")
    lines += ["const Library& library() {", "  static const Library the_library = {"]
    lines += [f'    R"metal({source})metal",', "    {"]
    for number, (name, expression) in enumerate(t.instances):
        cooperative = str(expression.partition("<")[0] in t.cooperative).lower()
        lines.append(
            f"      make_kernel<&{expression}>"
            f"({json.dumps(name)}, arguments_{number}, {cooperative}),"
        )
    lines.append("    }, {")
    for name, (kind, index) in t.constants.items():
        value = f"&{name}, nullptr" if kind == "bool" else f"nullptr, &{name}"
        lines.append(f'      {{"{name}", {index}, {value}}},')
    lines.append("    }, [] {")
    lines += [f"      {name} = {expression};" for name, expression in t.derived.items()]
    lines += ["    }};", "  return the_library;", "}", "}"]
    return "\n".join(lines) + "\n"


# ---- check -----------------------------------------------------------------------


def nodes(
    tree: dict[str, Any], inside_function: bool = False
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every node of the source in clang's tree, and whether it is inside a function."""
    if tree.get("isImplicit"):
        return
    yield tree, inside_function
    inside_function = inside_function or tree.get("kind") in ("FunctionDecl", "CXXMethodDecl")
    for child in tree.get("inner", []):
        yield from nodes(child, inside_function)


ADDRESS_SPACE = r"\b(device|constant|threadgroup|address_space)\b"
FORBIDDEN = {
    "CXXNewExpr": "new",
    "CXXDeleteExpr": "delete",
    "CXXThrowExpr": "throw",
    "CXXTryStmt": "try",
    "GotoStmt": "goto",
    "LambdaExpr": "a lambda",
    "CXXDynamicCastExpr": "dynamic_cast",
}


def broken_rules(tree: dict[str, Any], variables: set[str]) -> Iterator[str]:
    """What Metal refuses although C++ allows it. ``variables`` were function constants."""
    for node, inside_function in nodes(tree):
        kind = node.get("kind", "")
        type_name = node.get("type", {}).get("qualType", "")
        what = f"'{node.get('name', kind)}' of type '{type_name}'"
        if kind in FORBIDDEN:
            yield f"{FORBIDDEN[kind]} does not exist in Metal"
        if re.search(r"\b(long )?double\b", type_name):
            yield f"{what}: Metal has no double (a literal without f?)"
        if kind in ("VarDecl", "ParmVarDecl", "FieldDecl"):
            if re.search(r"[*&]", type_name) and not re.search(ADDRESS_SPACE, type_name):
                yield f"{what}: a pointer or reference without an address space"
        if kind == "VarDecl" and (not inside_function or node.get("storageClass") == "static"):
            if not re.search(ADDRESS_SPACE, type_name) and node.get("name") not in variables:
                yield f"{what}: a global variable must be constant"


# What of Metal's library the kernels may call. Arithmetic must be correctly rounded under
# any options: so the precise form, and no plain `/` of floats.
ALLOWED = {
    "as_type",
    "max",  # of integers, see the stand-in
    "precise::divide",
    "precise::fma",
    "precise::rint",
    "precise::sqrt",
    "simd_shuffle",
    "simd_shuffle_xor",
    "threadgroup_barrier",
    "make_float4",  # float4(...) to us
}


def library_functions(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The stand-in's functions: clang's number and the name with its namespaces."""
    for node in tree.get("inner", []):
        if node.get("kind") == "NamespaceDecl":
            inside = "" if node["name"] == "metal" else f"{prefix}{node['name']}::"
            yield from library_functions(node, inside)
        elif node.get("kind") in ("FunctionDecl", "FunctionTemplateDecl"):
            yield node["id"], prefix + node["name"]
            yield from library_functions(node, prefix)


def inexact(tree: dict[str, Any], library: dict[str, str]) -> Iterator[str]:
    """Calls of Metal's library that are not ALLOWED, and divisions of floats."""
    for node, _ in nodes(tree):
        called = library.get(node.get("referencedDecl", {}).get("id"), "make_float4")
        if called not in ALLOWED:
            yield f"'{called}' of Metal's library is not on the list of what may be used"
        floats = re.search(r"\b(float|half|bfloat)", node.get("type", {}).get("qualType", ""))
        if node.get("opcode") in ("/", "/=") and floats:
            yield "a plain '/' of floats: Metal promises the rounding of precise::divide only"


CHECKED = ["-x", "c++", "-nostdinc", "-fno-exceptions", "-fno-rtti", "-DMETAL_ADDRESS_SPACES"]


def checked(path: Path, version: str) -> Translation:
    t = translated(preprocessed(path, version), SHARED_TO_CHECK, storage="")
    # Before its version 4, Metal is C++14.
    standard = "c++14" if version < "400" else "c++17"
    command = [CLANG, *CHECKED, f"-std={standard}", "-pedantic", "-fsyntax-only"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-attributes", "-Wno-unused-function"]
    command += ["-Wno-duplicate-decl-specifier", "-Wno-gnu-line-marker"]
    source = with_instances(t)
    plain = subprocess.run([*command, "-"], input=source, text=True)
    if plain.returncode:
        fail(f"{path.name}, Metal {version}: does not compile")
    dump = [*command, "-Xclang", "-ast-dump=json", "-Xclang", "-ast-dump-filter=", "-"]
    tree = subprocess.run(dump, input=source, text=True, capture_output=True, check=True)
    declarations = json.loads(tree.stdout)
    stand_in = [d for d in declarations["inner"] if d.get("name") in ("metal", "as_type")]
    library = dict(library_functions({"inner": stand_in}))
    # Our checks' own variables are not part of the source.
    declarations["inner"] = [
        d for d in declarations["inner"] if d.get("name") not in ("instances", "metal")
    ]
    problems = {*broken_rules(declarations, {*t.constants, *t.derived})}
    problems |= {*inexact(declarations, library)}
    if problems:
        fail(f"{path.name}, Metal {version}:\n  " + "\n  ".join(sorted(problems)))
    return t


def with_instances(t: Translation) -> str:
    """The text, and a use of every kernel."""
    undefine = "\n".join(f"#undef {w}" for w in ("device", "constant", "threadgroup", "thread"))
    uses = "\n".join(f"auto use_{i} = &{e};" for i, (_, e) in enumerate(t.instances))
    return f"{t.text}\n{undefine}\nnamespace instances {{\n{uses}\n}}\n"


# GPUs for which clang makes code, as a stand-in for Apple's.
GPUS = {
    "nvptx64-nvidia-cuda": [],
    "amdgcn-amd-amdhsa": ["-nogpulib", "-mcpu=gfx90a"],
}
IN_MEMORY = {
    r" alloca .*": "a variable of a thread's in memory",
    r"(?:insert|extract)element .*, i\d+ %[\w.]+$": "an element by a variable's number",
}


def not_in_registers(t: Translation) -> Iterator[str]:
    """Where a GPU would have to index its registers, or keep a variable in memory."""
    for target, options in GPUS.items():
        command = [CLANG, *CHECKED, f"--target={target}", *options, "-std=c++17", "-w", "-O2"]
        command += ["-S", "-emit-llvm", "-o", "-", "-"]
        done = subprocess.run(command, input=with_instances(t), text=True, capture_output=True)
        if done.returncode:
            yield f"{target}: {done.stderr}"
        function = ""
        for line in done.stdout.splitlines():
            if line.startswith("define "):
                function = line.partition("@")[2].partition("(")[0]
            for pattern, what in IN_MEMORY.items():
                if found := re.search(pattern, line):
                    yield f"{target}: {what}, in {function[:40]}: {found[0].strip()}"


def main() -> None:
    mode, source = sys.argv[1], Path(sys.argv[2])
    text = source.read_bytes()
    if not text.isascii():
        fail(f"{source.name}: MLX hands the source to Metal as ASCII")
    if mode == "check":
        for version in LANGUAGE_VERSIONS:
            t = checked(source, version)
        if problems := list(not_in_registers(t)):
            fail(f"{source.name}:\n  " + "\n  ".join(problems))
        print(f"{source.name}: {len(t.arguments)} kernels, {len(t.instances)} instances: ok")
    else:
        t = translated(preprocessed(source, LANGUAGE_VERSIONS[-1]), SHARED_TO_RUN)
        Path(sys.argv[3]).write_text(as_program(text.decode(), t))


if __name__ == "__main__":
    main()
