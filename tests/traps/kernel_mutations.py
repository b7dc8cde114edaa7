"""The bugs of ``mutations.py`` once more, as a Triton kernel has them; tests are of ``ops/triton``.

The interpreter and its guard must catch all of them without a GPU.
"""

from __future__ import annotations

from tests.traps.mutations import Mutation

TRITON = "kernels/nsa_kernels/triton"


def _of_kernel(
    trap: str, bug: str, file: str, old: str, new: str, test: str, quick: bool = False
) -> Mutation:
    return Mutation(trap, bug, f"{TRITON}/{file}", old, new, test, folder="ops/triton", quick=quick)


KERNEL_MUTATIONS = (
    _of_kernel(
        "inverted compression mask",
        "completed blocks are hidden, the others shown",
        "banded/band.py",
        "seen = j * STRIDE + OFFSET <= t",
        "seen = j * STRIDE + OFFSET > t",
        "test_compressed_attention.py::test_trap_inverted_compression_mask[8]",
        quick=True,
    ),
    _of_kernel(
        "inverted compression mask",
        "scores are those of blocks that end later",
        "selection/scores.py",
        "b_p = tl.where(o_j[:, None] * STRIDE + OFFSET <= b_t[None, :], b_p, 0.0)",
        "b_p = tl.where(o_j[:, None] * STRIDE + OFFSET > b_t[None, :], b_p, 0.0)",
        "test_block_selection.py::test_chosen_scores_are_the_highest[one_document-float32]",
    ),
    _of_kernel(
        "block visible one token early",
        "a block counts from its last token but one on",
        "banded/band.py",
        "seen = j * STRIDE + OFFSET <= t",
        "seen = j * STRIDE + OFFSET <= t + 1",
        "test_compressed_attention.py::test_trap_block_visible_one_token_early",
    ),
    _of_kernel(
        "block visible one token early",
        "a query sees the token after it in its own block",
        "selected/forward.py",
        "b_seen = position + token + 1 - (first_edge + i // TILES) * BLOCK",
        "b_seen = position + token + 2 - (first_edge + i // TILES) * BLOCK",
        "test_selected_attention.py::test_future_others_and_their_choices_change_no_bit[0-float32]",
    ),
    _of_kernel(
        "Eq. 9's sign",
        "a key counts for the block before the one it begins in",
        "selection/scores.py",
        "tl.store(p_out + 3, b_passed, mask=m_store & (o_b + 1 < pitch))",
        "tl.store(p_out - 1, b_passed, mask=m_store & (o_b > 0))",
        "test_block_selection.py::test_trap_eq_9_sign",
    ),
    _of_kernel(
        "finite mask value that leaks future blocks",
        "-1e9 for the hidden keys of the compressed and window branches",
        "banded/forward.py",
        'sees(b_t[:, None], o_j[None, :], OFFSET, STRIDE, WINDOW), b_s, -float("inf")',
        "sees(b_t[:, None], o_j[None, :], OFFSET, STRIDE, WINDOW), b_s, -1e9",
        "test_compressed_attention.py::test_trap_finite_mask_value_leaks_future",
    ),
    _of_kernel(
        "finite mask value that leaks future blocks",
        "-1e9 for the hidden keys of the selected branch",
        "selected/forward.py",
        'b_s = tl.where(seen, b_s, -float("inf"))',
        "b_s = tl.where(seen, b_s, -1e9)",
        "test_selected_attention.py::test_trap_finite_mask_value_leaks_future",
    ),
    _of_kernel(
        "k larger than the blocks there are",
        "places without an eligible block keep a future one",
        "selection/choose.py",
        "tl.where(b_local < num_blocks[:, None], b_local, -1)",
        "b_local",
        "test_block_selection.py::test_trap_k_larger_than_the_blocks_there_are",
    ),
    _of_kernel(
        "ties",
        "equal scores go to the higher index",
        "selection/top_keys.py",
        "W - o_column[None, :, :]",
        "o_column[None, :, :] + 1",
        "test_block_selection.py::test_trap_ties[0.0]",
    ),
    _of_kernel(
        "index order changing bits",
        "a tile walks its blocks in the order in which its tokens name them",
        "selected/lists.py",
        "before = counts_once[None, :] & (b_k[None, :] < b_j[:, None])",
        "before = counts_once[None, :] & (o_k[None, :] < o_c[:, None])",
        "test_selected_attention.py::test_trap_index_order_changing_bits",
    ),
    _of_kernel(
        "index order changing bits",
        "indices come in descending order",
        "selection/top_keys.py",
        "b_column = tl.where(o_n == i, first[:, None], b_column)",
        "b_column = tl.where(o_n == count[:, None] - 1 - i, first[:, None], b_column)",
        "test_block_selection.py::test_options[chosen_5]",
    ),
    _of_kernel(
        "rows or ranks fully masked",
        "a tile of which a row sees nothing makes its maximum -inf - -inf",
        "banded/forward.py",
        "        # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.\n"
        '        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)',
        "        b_safe = b_new",
        "test_compressed_attention.py::test_trap_fully_masked_rows",
    ),
    _of_kernel(
        "rows or ranks fully masked",
        "a query that chose no block of a tile makes its maximum -inf - -inf",
        "selected/forward.py",
        "    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.\n"
        '    b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)',
        "    b_safe = b_new",
        "test_selected_attention.py::test_trap_fully_masked_rows",
    ),
    _of_kernel(
        "zero compression windows",
        "a sum of nothing is divided by 0",
        "banded/forward.py",
        "b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)",
        "b_sum = b_sum",
        "test_compressed_attention.py::test_trap_zero_compression_windows[(3, 7, 2)]",
    ),
    _of_kernel(
        "zero-length documents",
        "tiles are numbered as if empty documents were not there",
        "shared/tables.py",
        "owner = torch.repeat_interleave(count)",
        "owner = torch.repeat_interleave(count[count > 0])",
        "test_compressed_attention.py::test_against_the_oracle[packed-float32]",
    ),
    _of_kernel(
        "tail padding that drops keys",
        "the last tile of keys is walked only when it is full",
        "banded/forward.py",
        "base, shared, limit, first, limit,",
        "base, shared, limit // BN * BN, first, limit,",
        "test_compressed_attention.py::test_against_the_oracle[one_document-float32]",
    ),
    _of_kernel(
        "tail padding that drops keys",
        "a short last selection block counts as empty",
        "selected/lists.py",
        "length = tl.load(block_lengths + base + j).to(tl.int32)",
        "length = tl.load(block_lengths + base + j).to(tl.int32) // BLOCK * BLOCK",
        "test_selected_attention.py::test_against_the_oracle[R1-float32]",
    ),
    _of_kernel(
        "int32 offsets",
        "rows of keys are int32 in the compressed and window branches",
        "banded/forward.py",
        "row = base + o_j.to(tl.int64)",
        "row = (base + o_j).to(tl.int32)",
        "test_compressed_attention.py::test_offsets_past_two_to_the_31[rows]",
        quick=True,
    ),
    _of_kernel(
        "int32 offsets",
        "KV heads are int32 in the compressed and window branches",
        "banded/forward.py",
        "p_k = k + i_g.to(tl.int64) * stride_kh",
        "p_k = k + i_g * stride_kh",
        "test_window_attention.py::test_offsets_past_two_to_the_31[heads]",
    ),
    _of_kernel(
        "int32 offsets",
        "rows of queries are int32 in the gradients of selected blocks",
        "selected/backward.py",
        "row = tl.load(p_rows + tl.minimum(place, num - 1)).to(tl.int64)",
        "row = tl.load(p_rows + tl.minimum(place, num - 1))",
        "test_selected_attention.py::test_offsets_past_two_to_the_31st[rows]",
    ),
    _of_kernel(
        "int32 offsets",
        "heads are int32 in the selected branch",
        "selected/forward.py",
        "i_g = tl.program_id(1).to(tl.int64)",
        "i_g = tl.program_id(1)",
        "test_selected_attention.py::test_offsets_past_two_to_the_31st[heads]",
    ),
    _of_kernel(
        "int32 offsets",
        "heads are int32 in the scores",
        "selection/scores.py",
        "i_g = tl.program_id(1).to(tl.int64)",
        "i_g = tl.program_id(1).to(tl.int32)",
        "test_selection_chunks.py::test_offsets_past_two_to_the_31st[heads]",
    ),
    _of_kernel(
        "int32 offsets",
        "rows are int32 where branches are combined",
        "combine.py",
        "o_row = tl.program_id(0).to(tl.int64) * BM",
        "o_row = tl.program_id(0) * BM",
        "test_combine.py::test_offsets_past_two_to_the_31[rows]",
    ),
    _of_kernel(
        "KV base pointer wrong with batches",
        "every document reads the keys of the first",
        "banded/forward.py",
        "base = tl.load(tiles + i_tile * 4 + 3)",
        "base = tl.load(tiles + 3)",
        "test_compressed_attention.py::test_trap_kv_base_with_batches",
    ),
    _of_kernel(
        "KV base pointer wrong with batches",
        "every KV head reads the keys of the first",
        "banded/forward.py",
        "p_k = k + i_g.to(tl.int64) * stride_kh",
        "p_k = k",
        "test_window_attention.py::test_against_the_oracle[one_document-float32]",
    ),
    _of_kernel(
        "KV base pointer wrong with batches",
        "every document reads the blocks of the first",
        "selected/lists.py",
        "p_rows = block_rows + i_g * stride_rows + base",
        "p_rows = block_rows + i_g * stride_rows",
        "test_selected_attention.py::test_against_the_oracle[R2_packed-float32]",
    ),
    _of_kernel(
        "unmasked dK/dV store",
        "a short tile's gradients are stored as those of a whole one",
        "banded/backward.py",
        "mask = ((o_j >= first_key) & (o_j < end_key))[:, None] & (o_d < D)[None, :]",
        "mask = (o_j >= 0)[:, None] & (o_d < D)[None, :]",
        "test_compressed_attention.py::test_against_the_oracle[packed-float32]",
    ),
    _of_kernel(
        "unmasked dK/dV store",
        "a short block's gradients are stored as those of a whole one",
        "selected/backward.py",
        "mask = (o_n < length)[:, None] & (o_d < D)[None, :]",
        "mask = (o_n < BLOCK)[:, None] & (o_d < D)[None, :]",
        "test_selected_attention.py::test_against_the_oracle[R2_packed-float32]",
    ),
    _of_kernel(
        "fp16 dq",
        "dq is added up over tiles in float16 in the compressed and window branches",
        "banded/backward.py",
        "        b_dq = add_dot(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION)\n",
        "        b_dq = add_dot(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION)\n"
        "        b_dq = b_dq.to(tl.float16).to(tl.float32)\n",
        "test_window_attention.py::test_against_the_oracle[one_document-float32]",
    ),
    _of_kernel(
        "fp16 dq",
        "dq is added up over blocks in float16 in the selected branch",
        "selected/backward.py",
        "b_dq = add_dot(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION, APART)\n",
        "b_dq = add_dot(b_dq, b_ds.to(b_k.dtype), b_k, PRECISION, APART)\n"
        "        b_dq = b_dq.to(tl.float16).to(tl.float32)\n",
        "test_selected_attention.py::test_against_the_oracle[R1-float32]",
    ),
    _of_kernel(
        "float32 atomics not repeatable",
        "the programs of a selected block add its dk to one place atomically",
        "selected/backward.py",
        "    store_tile(dk + tile * DK, b_dk * scale, BN, DK, PDK)\n",
        "    tile = (before - first_program).to(tl.int32) * BLOCK + first_key\n"
        "    p_dk = dk + (tile + tl.arange(0, BN)[:, None]) * DK + o_dk[None, :]\n"
        "    tl.atomic_add(p_dk, b_dk * scale, mask=(o_dk < DK)[None, :])\n",
        "test_selected_attention.py::test_lists_of_queries_cut_in_pieces[one]",
        quick=True,
    ),
    _of_kernel(
        "NaN left behind in a masked tile",
        "masked rows of keys and values hold whatever was there",
        "banded/band.py",
        "return tl.load(p + o_row[:, None] + o_col[None, :], mask=mask, other=0.0)",
        "return tl.load(p + o_row[:, None] + o_col[None, :], mask=mask)",
        "test_window_attention.py::test_against_the_oracle[one_document-float32]",
    ),
    _of_kernel(
        "NaN left behind in a masked tile",
        "keys and values behind the last query are multiplied by 0",
        "selected/blocks.py",
        "mask = (first + o_n < limit)[:, None] & (o_d < WIDTH)[None, :]",
        "mask = (first + o_n >= 0)[:, None] & (o_d < WIDTH)[None, :]",
        "test_selected_attention.py::test_trap_nan_behind_the_last_query",
        quick=True,
    ),
)
