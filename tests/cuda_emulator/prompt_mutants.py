"""Wrong copies of the CUDA kernels for many tokens. A test shows that the emulator catches each of them."""

from __future__ import annotations

from pathlib import Path

from cuda_emulator.emulation import PROMPT_SOURCES
from cuda_emulator.mutants import Mutant, copies_of, write_table

PROMPT_MUTANTS = [
    *(Mutant("original", "", "", form) for form in ("Plain", "Int4")),
    Mutant("no_barrier_in_the_loop", "sync_block();  // all copies of this stage are there", "//"),
    Mutant("wait_too_lax", "copy_wait<STAGES - 2>();", "copy_wait<STAGES - 1>();"),
    Mutant("slot_in_use_overwritten", "fetch_rows(i + STAGES - 1, next);", "fetch_rows(i + STAGES - 1, slot);"),
    Mutant("no_barrier_before_sums", "sync_block();    // all have used the last stage", ""),
    Mutant("last_copies_not_awaited", "copy_wait<0>();  // the last copies are zeros", "//"),
    Mutant("no_barrier_after_sums", "= sums_of(part);\n    sync_block();\n", "= sums_of(part);\n"),
    Mutant("group_forgotten", "for (int group = 0; group < W.groups; ++group)", "for (int group = 1; group < W.groups; ++group)"),
    Mutant("bias_in_each_group", "p_.bias && group_ == 0 &&", "p_.bias &&"),
    Mutant("bias_forgotten", "p_.bias && group_ == 0 &&", "false &&"),
    Mutant("no_zeros_behind_the_rows", ") * 32), k < k_tiles_);", ") * 32), true);"),
    Mutant("no_zeros_behind_the_weights", "k < k_words_ && first", "first"),
    Mutant("operands_exchanged", "a.v, w[n].v[2], w[n].v[3], T()", "a.v, w[n].v[3], w[n].v[2], T()"),
    Mutant("unit_of_other_place", "unit % TILE / 8 * 4", "unit % TILE / 8 * 2"),
    Mutant("rows_of_units_exchanged", "to[0] = from_float<T>(c[0] * c[1]), to[2] =", "to[2] = from_float<T>(c[0] * c[1]), to[0] ="),
    Mutant("up_activated", "if (p_.gated) return;\n", ""),
    Mutant("columns_of_units_not_checked", "if (column_tile(n) >= n_tiles_) return;", ""),
    Mutant("channels_of_t_not_checked", "if (column_tile(n) < n_tiles_) body(", "body("),
    Mutant("stream_forgotten", "if (!p_.first) sums", "if (false) sums"),
    Mutant("stream_of_other_warp", "own_stream() + ((m * W.n + n) * 2 + half)", "own_stream() + ((m * W.n + n) * 2 + 1 - half)"),
    Mutant("x_not_added", "x.v[0] + c[2 * i],", "c[2 * i],"),
    Mutant("rows_of_y_not_checked", "if (row >= p_.tokens || column >= p_.hidden) return;", "if (column >= p_.hidden) return;"),
    Mutant("channels_of_y_not_checked", "if (row >= p_.tokens || column >= p_.hidden) return;", "if (row >= p_.tokens) return;"),
    Mutant("gain_forgotten", "Pair{{s[0] * p_.inverse_gain", "Pair{{s[0]"),
    Mutant("output_bias_forgotten", "if (at < p_.hidden) bias", "if (at < 0) bias"),
    Mutant("output_bias_of_other_channel", "column(i / 4, i / 2 % 2) + i % 2", "column(i / 4, i / 2 % 2)"),
    Mutant("x_in_other_order", "i % 2 * 8, column = first_column", "i / 2 * 8, column = first_column"),
    # What quantised weights have of their own.
    Mutant("scales_of_other_column", "lane_ / 4 * p_.scales", "lane_ % 8 * p_.scales", "Int4"),
    Mutant("scales_cut_short", "lane_ < 2 * p_.scales", "lane_ < p_.scales", "Int4"),
    Mutant("scale_of_first_block", "p_.scales + j * p_.scales / TILES", "p_.scales", "Int4"),
    Mutant("channels_of_x_not_checked", "column + 1 < p.hidden ? from[1] : 0", "true ? from[1] : 0", "Int4"),
]  # fmt: skip


def write_prompt_mutants(folder: Path) -> Path:
    """Write all mutants into `folder`, with thread blocks of 64 rows.

    Returns:
        A file for `PROMPT_MUTANTS` of emulate.cpp: entries of its table of kernels. The name of a mutant's kernel starts
        with the mutant's name and a point.
    """
    copies, entries = [], []
    for name, variants, changed in copies_of(PROMPT_MUTANTS, PROMPT_SOURCES):
        copies.append(changed)
        space = f"lockkit_cuda::{name}"
        calls = {"pack": f"{space}::prompt_pack(args)"}
        for form in (variant.format for variant in variants):
            for kernel, units in (("units", "true"), ("stream", "false")):
                calls[f"{kernel}_Half_{form}_64"] = f"{space}::Prompt<Half, {space}::{form}, {units}, 64>(args).run()"
        for kernel, call in calls.items():
            entries.append(f'{{"{name}.prompt_{kernel}", [](const PromptArgs& args) {{ {call}; }}}},\n')
    return write_table(folder, "prompt_mutants", ("args.h", "prompt_args.h", "device.h"), copies, entries)
