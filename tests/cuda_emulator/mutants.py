"""Wrong copies of the CUDA kernel. A test shows that the emulator catches each of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
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
        modes: those that are tried.
    """

    name: str
    before: str
    after: str
    format: str = "Plain"
    modes: tuple[str, ...] = ("GLOBAL",)


MUTANTS = [
    *(Mutant("original", "", "", form, BOTH) for form in ("Plain", "Int4", "Int8")),
    # Barriers and waits.
    Mutant("no_barrier_after_t", "s.v[1]);\n    });\n    sync_block();\n", "s.v[1]);\n    });\n", modes=BOTH),
    Mutant(
        "no_barrier_after_parts",
        "2 * i + 1]}};\n        }\n    sync_block();\n",
        "2 * i + 1]}};\n        }\n",
        modes=BOTH,
    ),
    Mutant("no_barrier_after_units", "receive_units(l);\n      sync_block();\n", "receive_units(l);\n"),
    Mutant("products_not_awaited", "wait_for_arrivals(products_arrive_, l & 1);", "", modes=("CLUSTER",)),
    Mutant("units_not_awaited", "wait_for_arrivals(products_arrive_ + 1, l & 1);", "", modes=("CLUSTER",)),
    Mutant("phase_of_first_block", "(products_arrive_ + 1, l & 1)", "(products_arrive_ + 1, 0)", modes=("CLUSTER",)),
    Mutant("too_few_products_expected", "(p_.gated ? 8 : 4)", "4", modes=("CLUSTER",)),
    Mutant("too_few_units_expected", "rows_ * p_.rank * 2)", "rows_ * p_.rank)", modes=("CLUSTER",)),
    Mutant(
        "next_products_not_expected",
        "if (thread() == 0 && l + 1 < p_.depth) expect_products();",
        "",
        modes=("CLUSTER",),
    ),
    Mutant("flag_of_any_block", "found.flag != unsigned(l + 1)", "found.flag == 0"),
    Mutant("second_flag_ignored", " && content.second_flag == unsigned(l + 1)", ""),
    Mutant("inbox_not_cleared", "if constexpr (MODE == GLOBAL) clear_inbox();", ""),
    Mutant("wait_too_lax", "copy_wait<STAGES - 1>();", "copy_wait<STAGES>();", modes=BOTH),
    # Weights.
    Mutant(
        "wrong_slot_of_the_ring", "(words_ + (slot_ * BATCH + i) * (THREADS * 16));", "(words_ + i * (THREADS * 16));"
    ),
    Mutant("stale_block", "depth_(p.depth)", "depth_(p.depth - 1)"),
    Mutant("batch_too_long", "if (end - k >= BATCH * TILES) {", "if (true) {"),
    Mutant("word_of_the_batch", "weights_.word(word + i)", "weights_.word(i)"),
    Mutant("batch_not_left", "left_ = left_ > BATCH ? left_ - BATCH : 0;", "left_ = 0;"),
    Mutant(
        "wrong_part_of_down",
        "(all_in + (first_tile + tile) * rank_words + down_first)",
        "(all_in + (first_tile + tile) * rank_words)",
    ),
    # Products.
    Mutant("fragment_of_wrong_row", "a[1] = *reinterpret_cast<const uint32_t*>(high);", "a[1] = a[0];", modes=BOTH),
    Mutant("fragment_of_wrong_column", "(high + 8);", "(high);"),
    Mutant("row_of_other_token", "smaller(lane_ / 4 + 8, p_.rows - 1)", "smaller(lane_ / 4 + 7, p_.rows - 1)"),
    Mutant(
        "operands_exchanged",
        "a[i / TILES][i % TILES], b.v[2], b.v[3], T());",
        "a[i / TILES][i % TILES], b.v[3], b.v[2], T());",
    ),
    Mutant("part_forgotten", "part < p_.parts; ++part", "part < p_.parts - 1; ++part", modes=BOTH),
    Mutant("units_of_first_part", "down_first_ * FORMAT::TILES,\n", "0,\n"),
    Mutant("member_forgotten", "8 * i < p_.team) sum", "8 * i < p_.team - 1) sum", modes=BOTH),
    Mutant("peer_forgotten", "peer < p_.team; peer += 16", "peer < p_.team - 1; peer += 16", modes=BOTH),
    Mutant("wrong_owner", "(pair + 0.5f)", "(pair + 1.5f)", modes=BOTH),
    Mutant("units_of_a_pair_exchanged", "unit % 2 ? pack_pair", "unit % 2 == 0 ? pack_pair", modes=BOTH),
    Mutant("rows_not_checked", "if (row >= rows_) continue;", "", modes=BOTH),
    Mutant("channels_not_checked", "if (column >= p_.hidden) continue;", ""),
    Mutant("stream_not_added", "x.v[0] + s.v[0], x.v[1] + s.v[1]", "x.v[0] + s.v[0], x.v[1]"),
    Mutant("gain_forgotten", "s.v[j] * p_.inverse_gain + bias", "s.v[j] + bias"),
    Mutant("bias_of_first_block", "p_.bias + size_t(l) * p_.columns()", "p_.bias"),
    Mutant("bias_forgotten", "sum.v[0] += bias[0];", ""),
    Mutant("bias_of_first_member", "(first_unit + unit) * width", "unit * width"),
    Mutant("output_bias_forgotten", "p_.output_bias ? p_.output_bias[column] : 0.f", "0.f"),
    # What quantised weights have of their own.
    Mutant("middle_is_wrong", "LOWER = 0xe408e408", "LOWER = 0xe407e407", "Int4"),
    Mutant(
        "halves_exchanged",
        "{{scaled(lower_half(low), first), scaled(upper_half(low), first),",
        "{{scaled(upper_half(low), first), scaled(lower_half(low), first),",
        "Int4",
    ),
    Mutant("scale_of_first_block", "[j * scales_ / TILES]", "[0]", "Int4"),
    Mutant("scales_of_other_column", "lane / 4 * 4 * p.scales", "lane % 8 * 4 * p.scales", "Int4"),
    Mutant("scales_cut_short", "else copy_async<16>(to, from);", "else copy_async<8>(to, from);", "Int4"),
    Mutant(
        "one_slot_for_scales",
        "return scales_at_ + (slot_ * BATCH + i) * (THREADS * 4) * scales_;",
        "return scales_at_;",
        "Int8",
    ),
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


def copies_of(mutants: Sequence[Mutant], sources: Iterable[str]) -> Iterator[tuple[str, list[Mutant], str]]:
    """For each name among `mutants`: the name, its mutants, and the changed copy of the sources, in a namespace of that name."""
    source = re.sub("#pragma once|#include .*", "", "".join((KERNEL / name).read_text() for name in sources))
    for name in dict.fromkeys(mutant.name for mutant in mutants):
        *_, mutant = variants = [mutant for mutant in mutants if mutant.name == name]
        changed = source
        if mutant.before:
            found = changed.count(mutant.before)
            assert found == 1, f"{name}: {mutant.before!r} is {found} times in the kernel"
            changed = changed.replace(mutant.before, mutant.after)
        changed = changed.replace("namespace lockkit_cuda {", f"namespace lockkit_cuda {{ namespace {name} {{")
        yield name, variants, changed.replace("}  // namespace lockkit_cuda", "}}")


def write_table(folder: Path, stem: str, headers: Iterable[str], copies: Iterable[str], entries: Iterable[str]) -> Path:
    """Write copies of the kernel and the entries of emulate.cpp's table of kernels, whose path is returned."""
    head = "".join(f'#include "{name}"\n' for name in headers)
    (folder / f"{stem}.h").write_text(head + "\n".join(copies))
    table = folder / f"{stem}.inc"
    table.write_text("".join(entries))
    return table


def write_mutants(folder: Path) -> Path:
    """Write all mutants into `folder`.

    Returns:
        A file for `MUTANTS` of emulate.cpp: entries of its table of kernels. The name of a mutant's kernel starts with
        the mutant's name and a point.
    """
    copies, entries = [], []
    for name, variants, changed in copies_of(MUTANTS, SOURCES):
        copies.append(changed)
        for form, mode in ((mutant.format, mode) for mutant in variants for mode in mutant.modes):
            space = f"lockkit_cuda::{name}"
            batches = f"{4 if form == 'Plain' else 2}, {4 if mode == 'CLUSTER' else 2}"
            kernel = f"{space}::Chain<Half, {space}::{form}, {space}::{mode}, {batches}>"
            entry = f"{name}.chain_Half_{form}_{mode}"
            entries.append(f'{{"{entry}", [](const Args& args) {{ {kernel}(args).run(); }}}},\n')
    return write_table(folder, "mutants", ("args.h", "device.h", "variants.h"), copies, entries)
