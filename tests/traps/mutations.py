"""The bugs that the trap tests must catch, as changes of a piece of text.

The table in tests/README.md has a row for each; ``run_mutations.py`` puts them in, one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """A bug: ``old`` in ``file`` becomes ``new``, and ``test`` in ``folder`` of tests/ fails.

    trap and bug are the first two columns of the table in tests/README.md. quick: put in by every
    run of the tests, not only by those with --run-slow.
    """

    trap: str
    bug: str
    file: str
    old: str
    new: str
    test: str
    folder: str = "traps"
    quick: bool = False

    @property
    def node(self) -> str:
        """The test as pytest is told it."""
        return f"tests/{self.folder}/{self.test}"

    @property
    def row(self) -> str:
        """The row of the table in tests/README.md."""
        return f"| {self.trap} | {self.bug} | `{self.test}` |"

    def mutated(self, tree: Path) -> str:
        """The text of ``file`` in ``tree`` with the bug in it.

        Raises:
            LookupError: unless ``old`` stands there exactly once.
        """
        text = (tree / self.file).read_text(encoding="utf-8")
        found = text.count(self.old)
        if found != 1:
            raise LookupError(
                f"{self.trap} ({self.bug}): {self.old!r} stands {found} times in {self.file}; the "
                "code has changed, and the mutation must follow it"
            )
        return text.replace(self.old, self.new)


PYTORCH = "kernels/nsa_kernels/pytorch"

MUTATIONS = (
    Mutation(
        "inverted compression mask",
        "completed blocks are hidden, the others shown",
        f"{PYTORCH}/compressed_attention.py",
        "return ends > position",
        "return ends <= position",
        "test_compression.py::test_trap_inverted_compression_mask",
    ),
    Mutation(
        "block visible one token early",
        "a block counts from its last token but one on",
        f"{PYTORCH}/compressed_attention.py",
        "* stride + (block - 1)",
        "* stride + (block - 2)",
        "test_compression.py::test_trap_block_visible_one_token_early",
    ),
    Mutation(
        "block visible one token early",
        "the number of blocks that all queries of a tile see is one token early",
        f"{PYTORCH}/compressed_attention.py",
        "(position - block + 1) // stride + 1",
        "(position - block + 2) // stride + 1",
        "test_compression.py::test_trap_block_visible_one_token_early",
    ),
    Mutation(
        "Eq. 9's sign",
        "+m+k in the place of +m-k",
        f"{PYTORCH}/block_selection.py",
        "padded[..., overlap - 1 - b : overlap - 1 - b + width]",
        "F.pad(padded[..., overlap - 1 + b :], (0, b))",
        "test_selection.py::test_trap_eq_9_sign",
    ),
    Mutation(
        "Eq. 9's sign",
        "-m-k, as printed, in the place of +m-k",
        f"{PYTORCH}/block_selection.py",
        "scores + spread[..., a::per_block]",
        "scores + F.pad(spread, (a, 0))[..., :width:per_block]",
        "test_selection.py::test_trap_eq_9_sign",
    ),
    Mutation(
        "finite mask value that leaks future blocks",
        "-1e9 for the hidden keys of the compressed and window branches",
        f"{PYTORCH}/_tiled_attention.py",
        "grid.masked_fill(hidden, -math.inf)",
        "grid.masked_fill(hidden, -1e9)",
        "test_masking.py::test_trap_finite_mask_value_that_leaks_future_blocks",
    ),
    Mutation(
        "finite mask value that leaks future blocks",
        "-1e9 for the hidden keys of the selected branch",
        f"{PYTORCH}/selected_attention.py",
        "logits.masked_fill(hidden, -math.inf)",
        "logits.masked_fill(hidden, -1e9)",
        "test_masking.py::test_trap_finite_mask_value_that_leaks_future_blocks",
    ),
    Mutation(
        "k larger than the blocks there are",
        "the best n of fewer than n blocks are asked for",
        f"{PYTORCH}/block_selection.py",
        "if num_blocks <= num_selected:",
        "if num_blocks < 0:",
        "test_selection.py::test_trap_k_larger_than_the_blocks_there_are",
    ),
    Mutation(
        "k larger than the blocks there are",
        "places without an eligible block keep a future one",
        f"{PYTORCH}/block_selection.py",
        "best.masked_fill(best > own, -1)",
        "best.clone()",
        "test_selection.py::test_trap_k_larger_than_the_blocks_there_are",
    ),
    Mutation(
        "ties",
        "equal scores go to the higher index",
        f"{PYTORCH}/block_selection.py",
        "tied.cumsum(dim=-1, dtype=torch.int32)",
        "tied.flip(-1).cumsum(dim=-1, dtype=torch.int32).flip(-1)",
        "test_selection.py::test_trap_ties",
    ),
    Mutation(
        "ties",
        "float64 scores are compared as they are",
        f"{PYTORCH}/block_selection.py",
        "scores = scores.float()",
        "scores = scores",
        "test_selection.py::test_trap_ties_below_float32",
    ),
    Mutation(
        "index order changing bits",
        "indices stand in the order of scores",
        f"{PYTORCH}/block_selection.py",
        "return chosen.nonzero()[:, -1].view(*scores.shape[:-1], num_selected)",
        "return scores.topk(num_selected, dim=-1).indices",
        "test_selection.py::test_trap_index_order_changing_bits",
    ),
    Mutation(
        "rows or ranks fully masked",
        "queries before the first block's end get a softmax over nothing",
        f"{PYTORCH}/compressed_attention.py",
        "blind = min(max(0, block - 1 - segment.position), segment.length)",
        "blind = 0",
        "test_compression.py::test_trap_row_fully_masked",
    ),
    Mutation(
        "rows or ranks fully masked",
        "a rank without a compression block skips the key compressor",
        "nsa_dist/attention/flow.py",
        "k = apply_compressor(k_compressor, k_ext, rows, block, self.ops)",
        "k = apply_compressor(k_compressor, k_ext, rows, block, self.ops)"
        " if len(rows) else k_ext[:0]",
        "test_ranks.py::test_trap_rank_fully_masked",
    ),
    Mutation(
        "zero compression windows",
        "the number of blocks of a document shorter than one falls below 0",
        "nsa_dist/plan/build.py",
        "((stream.doc_length - block) // stride + 1).clamp(min=0)",
        "((stream.doc_length - block) // stride + 1)",
        "test_compression.py::test_trap_zero_compression_windows",
    ),
    Mutation(
        "zero-length documents",
        "documents are numbered as if the empty ones were not there",
        "nsa_dist/plan/stream.py",
        "piece_doc = torch.searchsorted(boundaries, piece_start",
        "piece_doc = torch.searchsorted(boundaries.unique_consecutive(), piece_start",
        "test_documents.py::test_trap_zero_length_documents",
    ),
    Mutation(
        "slack rows past cu_seqlens[-1]",
        "only too few rows are refused",
        "nsa_dist/plan/layout.py",
        "if int(cu_seqlens[-1]) != length:",
        "if int(cu_seqlens[-1]) > length:",
        "test_documents.py::test_trap_slack_rows_past_the_last_document",
    ),
    Mutation(
        "slack rows past cu_seqlens[-1]",
        "sharding leaves its padding out of the boundaries",
        "nsa_dist/sharding.py",
        "cu_seqlens = torch.cat((cu_seqlens, cu_seqlens.new_tensor([padded_length])))",
        "cu_seqlens = cu_seqlens.clone()",
        "test_documents.py::test_trap_slack_rows_past_the_last_document",
    ),
    Mutation(
        "global grad norm different at cp=1 and cp=4 only with packed documents",
        "the mean is over each rank's own labels, then over ranks",
        "nsa_dist/sharding.py",
        "num_targets=int((targets != IGNORED_LABEL).sum()),",
        "num_targets=sharding.context.size"
        " * max(1, int((sharding.shard(targets, IGNORED_LABEL) != IGNORED_LABEL).sum())),",
        "test_ranks.py::test_trap_global_grad_norm_differs_with_packed_documents",
    ),
    Mutation(
        "one valid label in the whole batch",
        "a rank without labels divides 0 by 0",
        "nsa_dist/sharding.py",
        "num_targets=int((targets != IGNORED_LABEL).sum()),",
        "num_targets=int((sharding.shard(targets, IGNORED_LABEL) != IGNORED_LABEL).sum()),",
        "test_ranks.py::test_trap_one_valid_label_in_the_whole_batch",
    ),
    Mutation(
        "tail padding that drops keys",
        "a document's short last selection block is left out",
        "nsa_dist/plan/build.py",
        "selected_per_doc = (stream.doc_length + select - 1) // select",
        "selected_per_doc = stream.doc_length // select",
        "test_documents.py::test_trap_tail_padding_that_drops_keys",
    ),
    Mutation(
        "tail padding that drops keys",
        "a short last selection block counts as empty",
        "nsa_dist/plan/build.py",
        "(stream.doc_length[doc] - index * step).clamp(max=block)",
        "(stream.doc_length[doc] - index * step).clamp(max=block) // block * block",
        "test_documents.py::test_trap_tail_padding_that_drops_keys",
    ),
    Mutation(
        "int32 offsets",
        "the table of segments is int32",
        "kernels/nsa_kernels/segments.py",
        "torch.tensor(segments, dtype=torch.int64)",
        "torch.tensor(segments).to(torch.int32)",
        "test_numbers.py::test_trap_int32_offsets",
    ),
    Mutation(
        "int32 offsets",
        "rows of a batch start at int32 offsets",
        "nsa_dist/plan/layout.py",
        "first = torch.arange(batch) * length",
        "first = torch.arange(batch, dtype=torch.int32) * length",
        "test_numbers.py::test_trap_int32_offsets",
    ),
    Mutation(
        "int32 offsets",
        "a plan's rows are int32",
        "nsa_dist/plan/build.py",
        "own_rows=halo.rows(start[own_ids]),",
        "own_rows=halo.rows(start[own_ids]).int(),",
        "test_numbers.py::test_trap_int32_offsets",
    ),
    Mutation(
        "KV base pointer wrong with batches",
        "compressed keys are read from the first row's base",
        "nsa_dist/plan/build.py",
        "compressed_base = (compressed_per_doc.cumsum(0) - compressed_per_doc)[doc]",
        "compressed_base = torch.zeros_like(doc)",
        "test_documents.py::test_trap_kv_base_pointer_wrong_with_batches[compressed]",
    ),
    Mutation(
        "KV base pointer wrong with batches",
        "selection blocks are read from the first row's base",
        "nsa_dist/plan/build.py",
        "selected_base = (selected_per_doc.cumsum(0) - selected_per_doc)[doc]",
        "selected_base = torch.zeros_like(doc)",
        "test_documents.py::test_trap_kv_base_pointer_wrong_with_batches[selected]",
    ),
    Mutation(
        "KV base pointer wrong with batches",
        "windows are read from the first row's base",
        "nsa_dist/plan/build.py",
        'window_base = builders["window"].rows(start) - position',
        "window_base = torch.zeros_like(position)",
        "test_documents.py::test_trap_kv_base_pointer_wrong_with_batches[window]",
    ),
    Mutation(
        "unmasked dK/dV store",
        "a short block's gradients are stored as those of a whole one",
        f"{PYTORCH}/selected_attention.py",
        ".where(inside, num_rows)",
        ".clamp(max=num_rows)",
        "test_masking.py::test_trap_unmasked_dk_dv_store_past_a_short_block",
    ),
    Mutation(
        "unmasked dK/dV store",
        "gradients start as memory that was never written",
        f"{PYTORCH}/_common.py",
        "self._sum = torch.zeros_like(like)",
        "self._sum = torch.empty_like(like)",
        "test_masking.py::test_trap_unmasked_dk_dv_store_to_rows_that_nobody_sees",
    ),
    Mutation(
        "fp16 dq",
        "dq is added up over blocks in float16",
        f"{PYTORCH}/selected_attention.py",
        "pairs.by_query(grad_query).sum(dim=1).mul_(scale)",
        "sum(pairs.by_query(grad_query).half().unbind(1)).mul_(scale)",
        "test_numbers.py::test_trap_fp16_dq",
    ),
    Mutation(
        "float32 atomics not repeatable",
        "overlapping blocks add to a row in any order",
        f"{PYTORCH}/_common.py",
        "return target.index_add_(0, index, source)",
        "order = torch.randperm(len(index))\n"
        "    return target.index_add_(0, index[order], source[order])",
        "test_numbers.py::test_trap_float32_atomics_not_repeatable",
    ),
    Mutation(
        "float32 atomics not repeatable",
        "ranks' shares of a gradient are added in any order",
        "nsa_dist/comm/gather.py",
        "for piece in partial[1:]:",
        "for piece in partial[1:][torch.randperm(len(partial) - 1)]:",
        "test_ranks.py::test_trap_float32_sums_over_ranks_not_repeatable",
    ),
    Mutation(
        "global rank used inside a subgroup",
        "a group's rank is the process's rank",
        "nsa_dist/comm/group.py",
        "rank = dist.get_rank(group)",
        "rank = dist.get_rank()",
        "test_ranks.py::test_trap_global_rank_used_inside_a_subgroup",
    ),
    Mutation(
        "labels rolled after sharding",
        "each rank shifts the labels of its own tokens",
        "nsa_dist/sharding.py",
        "labels=sharding.shard(targets, IGNORED_LABEL),",
        "labels=sharding.shard(labels, IGNORED_LABEL).roll(-1, 1),",
        "test_ranks.py::test_trap_labels_rolled_after_sharding",
    ),
    Mutation(
        "NaN left behind in a masked tile",
        "keys and values that are not finite are multiplied by 0",
        f"{PYTORCH}/_common.py",
        "if not bad.any():",
        "if True:",
        "test_masking.py::test_trap_nan_left_behind_in_a_masked_tile",
    ),
    Mutation(
        "plan cached by shape and used for other documents",
        "the boundaries are no part of the key",
        "nsa_dist/attention/plan_cache.py",
        "if entry.key == key and _same_documents(entry.cu_seqlens, cu_seqlens):",
        "if entry.key == key:",
        "test_documents.py::test_trap_plan_cached_by_shape_and_used_for_other_documents",
    ),
    Mutation(
        "plan cached by shape and used for other documents",
        "the key holds the caller's tensor, which then changes in place",
        "nsa_dist/attention/plan_cache.py",
        "own = None if cu_seqlens is None else cu_seqlens.clone()",
        "own = cu_seqlens",
        "test_documents.py::test_trap_plan_cached_by_shape_and_used_for_other_documents",
    ),
)
