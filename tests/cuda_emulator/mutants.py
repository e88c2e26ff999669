"""Wrong copies of the CUDA kernel. A test shows that the emulator catches each of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cuda_emulator.emulation import KERNEL, SOURCES

BOTH = ("GLOBAL", "CLUSTER")


@dataclass(frozen=True)
class Mutant:
    """A copy of the kernel's source in which one piece is replaced. The piece must occur exactly once.

    Attributes:
        name: of the copy.
        before: the piece; empty for the original.
        after: what replaces it.
        format: of the weights, as in variants.h.
        modes: those that are tried. In the others the copy differs in nothing.
    """

    name: str
    before: str
    after: str
    format: str = "Plain"
    modes: tuple[str, ...] = ("GLOBAL",)


MUTANTS = [
    *(Mutant("original", "", "", form, BOTH) for form in ("Plain", "Int4", "Int8")),
    Mutant("no_barrier_after_t", "      write_t();\n      sync_block();\n", "      write_t();\n", modes=BOTH),
    Mutant("no_meeting_before_units", "products(j);\n      meet();\n", "products(j);\n", modes=BOTH),
    Mutant(
        "no_meeting_after_units",
        "meet([&] { if (SPANS && j + 1 < blocks) sum_own_units(j + 1); });",
        "if (SPANS && j + 1 < blocks) sum_own_units(j + 1);",
        modes=BOTH,
    ),
    Mutant("no_barrier_after_staging", "0, width);\n        sync_block();\n", "0, width);\n"),
    Mutant("no_barrier_before_next_chunk", "if (start) sync_block();", ""),
    Mutant("no_barrier_before_arrival", "F meanwhile) {\n  sync_block();\n", "F meanwhile) {\n"),
    Mutant("no_barrier_after_meeting", "spin();\n  sync_block();\n", "spin();\n"),
    Mutant("stores_not_released", "add_release(barrier, add)", "add_relaxed(barrier, add)"),
    Mutant("counter_does_not_return", "0x80000000u - unsigned(team - 1)", "0x80000000u - unsigned(team)"),
    Mutant("wait_too_lax", "copy_wait<STAGES - 1>();", "copy_wait<STAGES>();"),
    Mutant(
        "wrong_slot_of_the_ring",
        "    return *reinterpret_cast<const Word*>(words_ + slot_ * (THREADS * 16));",
        "    return *reinterpret_cast<const Word*>(words_ + (slot_ + STAGES - 1) % STAGES * (THREADS * 16));",
    ),
    Mutant("stale_block", "blocks_left_(p.depth)", "blocks_left_(p.depth - 1)"),
    Mutant("fragment_of_wrong_row", "(at + 8 * pitch);", "(at + 7 * pitch);"),
    Mutant("fragment_of_wrong_column", "(at + 8 * pitch + 8);", "(at + 8 * pitch);"),
    Mutant(
        "operands_exchanged", "mma(sums(m)[1], a, b.v[2], b.v[3], T());", "mma(sums(m)[1], a, b.v[3], b.v[2], T());"
    ),
    Mutant(
        "member_forgotten",
        "for (int peer = part; peer < p_.team; peer += 8) {",
        "for (int peer = part; peer < p_.team - 1; peer += 8) {",
    ),
    Mutant("share_too_small", "/ p.team - first_unit_)", "/ p.team - first_unit_ - (member_ == 1))"),
    Mutant(
        "rows_not_checked", "if (row >= rows_ || column >= p_.hidden) continue;", "if (column >= p_.hidden) continue;"
    ),
    Mutant("channels_not_checked", "if (row >= rows_ || column >= p_.hidden) continue;", "if (row >= rows_) continue;"),
    Mutant("stream_not_added", "x.v[0] + s[0], x.v[1] + s[1]", "x.v[0] + s[0], x.v[1]"),
    Mutant("gain_forgotten", "s[j] * p_.inverse_gain + bias", "s[j] + bias"),
    Mutant("bias_of_first_block", "p_.bias + size_t(l + j) * p_.columns()", "p_.bias + size_t(j) * p_.columns()"),
    Mutant("bias_forgotten", "sum.v[0] += bias[0];", ""),
    Mutant("output_bias_forgotten", "p_.output_bias ? p_.output_bias[column] : 0.f", "0.f"),
    # What spans have of their own.
    Mutant("cross_term_dropped", "k = lane_ % 8; k < words; k += 8", "k = lane_ % 8 + 1; k < words; k += 8"),
    Mutant("cross_products_of_first_span", "size_t(l / p_.span) * pairs_before", "size_t(0) * pairs_before"),
    Mutant("no_wait_for_cross_products", "copy_wait<0>();  // before the barrier: cross products too\n", ""),
    Mutant(
        "no_meeting_between_blocks",
        "        meet([&]",
        "        if (j + 1 < blocks) sum_own_units(j + 1);\n        else meet([&]",
    ),
    Mutant("products_of_other_block", "p_.span + j * columns;", "p_.span;"),
    Mutant("sums_of_other_block", "sum_own_units(j + 1);", "sum_own_units(j);"),
    Mutant("units_of_other_block", "stage_units(j * p_.rank, j", "stage_units(0, j"),
    Mutant("no_barrier_after_units_of_block", "p_.rank, p_.rank);\n    sync_block();\n", "p_.rank, p_.rank);\n"),
    Mutant("down_before_up_in_later_spans", "in_span_ = 0, down_ = !down_;", "in_span_ = 0, down_ = true;"),
    # What quantised weights have of their own.
    Mutant("middle_is_wrong", "LOWER = 0xe408e408", "LOWER = 0xe407e407", "Int4"),
    Mutant(
        "halves_exchanged",
        "{{scaled(lower_half(low), first), scaled(upper_half(low), first),",
        "{{scaled(upper_half(low), first), scaled(lower_half(low), first),",
        "Int4",
    ),
    Mutant("scale_of_first_block", "[j * p_.scales / TILES]", "[0]", "Int4"),
    Mutant("scales_of_other_column", "lane / 4 * 4 * p.scales", "lane % 8 * 4 * p.scales", "Int4"),
    Mutant("scales_cut_short", "else copy_async<16>(to, from);", "else copy_async<8>(to, from);", "Int4"),
    Mutant("padding_multiplied", "if (j == 0 || j < left) multiply(", "multiply(", "Int4"),
    Mutant("chunk_in_tiles", "chunk_words_(words(p.chunk / TILE))", "chunk_words_(p.chunk / TILE)", "Int4"),
    Mutant("one_slot_for_scales", "return slot_ * (THREADS * 4) * p_.scales;", "return 0;", "Int8"),
    Mutant(
        "bytes_exchanged",
        "{{scaled(byte(a), first), scaled(byte(a >> 8), first),",
        "{{scaled(byte(a >> 8), first), scaled(byte(a), first),",
        "Int8",
    ),
    Mutant(
        "columns_exchanged",
        "first = (scales & 0xffffu) * 0x10001u, second = (scales >> 16)",
        "second = (scales & 0xffffu) * 0x10001u, first = (scales >> 16)",
        "Int8",
    ),
]


def write_mutants(folder: Path) -> Path:
    """Write all mutants into `folder`.

    Returns:
        A file for `MUTANTS` of emulate.cpp: entries of its table of kernels. The name of a mutant's kernel starts with
        the mutant's name and a point.
    """
    source = "".join((KERNEL / name).read_text() for name in SOURCES)
    copies, entries = [], []
    for name in dict.fromkeys(mutant.name for mutant in MUTANTS):
        *_, mutant = variants = [mutant for mutant in MUTANTS if mutant.name == name]
        changed = re.sub("#pragma once|#include .*", "", source)
        if mutant.before:
            found = changed.count(mutant.before)
            assert found == 1, f"{name}: {mutant.before!r} is {found} times in the kernel"
            changed = changed.replace(mutant.before, mutant.after)
        changed = changed.replace("namespace lockkit_cuda {", f"namespace lockkit_cuda {{ namespace {name} {{")
        copies.append(changed.replace("}  // namespace lockkit_cuda", "}}"))
        for form, mode in ((mutant.format, mode) for mutant in variants for mode in mutant.modes):
            space, stages = f"lockkit_cuda::{name}", 16 if form == "Plain" else 8
            kernel = f"{space}::Chain<Half, {space}::{form}, {space}::{mode}, 1, 1, {stages}>"
            entry = f"{name}.chain_Half_{form}_{mode}_1_1"
            entries.append(f'{{"{entry}", [](const Args& args) {{ {kernel}(args).run(); }}}},\n')
    (folder / "mutants.h").write_text('#include "args.h"\n#include "device.h"\n' + "\n".join(copies))
    table = folder / "mutants.inc"
    table.write_text("".join(entries))
    return table
