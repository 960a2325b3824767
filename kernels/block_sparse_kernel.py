"""Block-sparse attention on the GPU: one flash-attention forward whose key loop follows a `BlockPlan`.

One program computes one tile of ``BLOCK_M`` positions of one query block. It walks the key blocks its query
block keeps, tile by tile, and then, with a pooled tail, the pooled keys of all blocks with the kept ones masked,
or the one key that `block_tail` made of them for the whole query block.
Softmax runs online in the base-2 domain (Milakov & Gimelshein 2018; Dao 2023), accumulation in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _absorb(logits, scale, values, peak, total, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Take one tile of logits into the running softmax: peak and total ``[M]``, acc ``[M, DV]``, base 2.

    ``scale`` is positive and multiplied here, so that it fuses with the subtraction. The first peak is finite:
    a tile that is masked everywhere then leaves zeros, never NaN.
    """
    new_peak = tl.maximum(peak, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return new_peak, total, acc


# Lengths and strides of the plan change from call to call: compiling for their divisibility would gain nothing.
_UNSPECIALIZED = (
    "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ii",
    "stride_qob", "stride_qoh", "stride_kob", "stride_koh",
    "stride_tb", "stride_th", "stride_qsb", "stride_qsh", "stride_ksb", "stride_ksh",
    "stride_eb", "stride_eh", "stride_ei",
    "stride_mb", "stride_mh", "stride_mq",
    "q_len", "k_len", "q_blocks", "k_blocks", "heads", "block_q", "block_k", "slots",
)  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward(  # type: ignore[no-untyped-def]
    Q, K, V, Out, Lse,
    Counts, Indices, TailValue, TailWeight,
    QOrder, KOrder, ProgramOrder, TileBlock, TileStart, QStarts, KStarts, KeyEnds, KeyLengths,
    PooledK, PooledV, LogCount, Kept,
    Threshold, Needed,
    stride_qb, stride_qs, stride_qh, stride_qd,
    stride_kb, stride_ks, stride_kh, stride_kd,
    stride_vb, stride_vs, stride_vh, stride_vd,
    stride_ob, stride_os, stride_oh,
    stride_cb, stride_ch, stride_ib, stride_ih, stride_ii,
    stride_qob, stride_qoh, stride_kob, stride_koh,
    stride_tb, stride_th, stride_qsb, stride_qsh, stride_ksb, stride_ksh,
    stride_eb, stride_eh, stride_ei,
    stride_mb, stride_mh, stride_mq,
    q_len, k_len, q_blocks, k_blocks, heads, block_q, block_k, slots, scale, pv_skip,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_Q: tl.constexpr, TILES_K: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr,
    HAS_Q_STARTS: tl.constexpr, HAS_K_STARTS: tl.constexpr, SEARCH: tl.constexpr, HAS_BLOCK_TAIL: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr, HAS_TAIL: tl.constexpr, PRECISION: tl.constexpr,
    HAS_VERDICT: tl.constexpr, PV_SKIP: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile of every row in ``ProgramOrder``; ``scale`` includes log2(e).

    ``SEARCH`` above 0: keys are listed without gaps between blocks, and so many halvings find a key's block.
    A head has ``slots`` rows: query blocks of ``TILES_Q`` tiles each, or, where they vary in size, tiles.
    64-bit wherever a length meets a stride.
    """
    row = tl.load(ProgramOrder + tl.program_id(0) // TILES_Q)
    slot = row % slots
    h = (row // slots % heads).to(tl.int64)
    b = (row // slots // heads).to(tl.int64)

    # Which positions: [start, end) of query block `block`.
    if HAS_Q_STARTS:
        tile = b * stride_tb + h * stride_th + slot
        block = tl.load(TileBlock + tile)
        if block >= q_blocks:  # the grid is an upper bound
            return
        start = tl.load(TileStart + tile)
        end = tl.load(QStarts + b * stride_qsb + h * stride_qsh + block + 1)
    else:
        block = slot
        start = block * block_q + (tl.program_id(0) % TILES_Q) * BLOCK_M
        end = tl.minimum((block + 1) * block_q, q_len)
        if start >= end:
            return
    positions = start + tl.arange(0, BLOCK_M)
    in_block = positions < end
    if HAS_Q_ORDER:
        rows = tl.load(QOrder + b * stride_qob + h * stride_qoh + positions, mask=in_block, other=0).to(tl.int64)
    else:
        rows = positions.to(tl.int64)

    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q_mask = in_block[:, None]
    if BLOCK_D != D:
        q_mask = q_mask & (dims < D)[None, :]
    q_pointers = Q + b * stride_qb + h * stride_qh + rows[:, None] * stride_qs + dims[None, :] * stride_qd
    q = tl.load(q_pointers, mask=q_mask, other=0.0)

    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # Exact part: the kept key blocks, in the order of the list.
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    if HAS_K_ORDER:
        KOrder += b * stride_kob + h * stride_koh
    if HAS_K_STARTS:
        KStarts += b * stride_ksb + h * stride_ksh
    Indices += b * stride_ib + h * stride_ih + block.to(tl.int64) * stride_ii
    count = tl.load(Counts + b * stride_cb + h * stride_ch + block)
    readable = k_len
    if HAS_KEY_LENGTHS:
        readable = tl.minimum(tl.load(KeyLengths + b), k_len)
    columns = tl.arange(0, BLOCK_N)

    tiles = count * TILES_K
    if SEARCH:
        KeyEnds += b * stride_eb + h * stride_eh + block.to(tl.int64) * stride_ei
        listed = tl.load(KeyEnds + tl.maximum(count - 1, 0))
        tiles = tl.cdiv(tl.where(count > 0, listed, 0), BLOCK_N)
    elif HAS_K_STARTS:
        tiles = _count_tiles(Indices, KStarts, count, readable, BLOCK_N)
    if HAS_VERDICT:
        threshold = tl.load(Threshold + b * heads + h)
        Needed += ((b * heads + h) * q_blocks + block) * ((k_blocks + 31) // 32)
        # Peak of the blocks before this one, and the largest gain of this one's tiles so far.
        before = peak
        best = float("-inf")
    item = 0
    offset = 0
    for t in range(tiles):
        if SEARCH:
            in_range = t * BLOCK_N + columns < listed
            places = _listed_keys(Indices, KStarts, KeyEnds, count, t * BLOCK_N + columns, in_range, SEARCH)
        elif HAS_K_STARTS:
            j = tl.load(Indices + item).to(tl.int32)
            k_start = tl.load(KStarts + j) + offset
            k_end = tl.minimum(tl.load(KStarts + j + 1), readable)
            finished = k_start + BLOCK_N >= k_end
            item = tl.where(finished, item + 1, item)
            offset = tl.where(finished, 0, offset + BLOCK_N)
        else:
            j = tl.load(Indices + t // TILES_K).to(tl.int32)
            k_start = j * block_k + (t % TILES_K) * BLOCK_N
            k_end = tl.minimum((j + 1) * block_k, readable)
        if not SEARCH:
            in_range = columns < k_end - k_start
            places = k_start + columns
        if HAS_K_ORDER or SEARCH:
            tokens = places.to(tl.int64)
            if HAS_K_ORDER:
                tokens = tl.load(KOrder + places, mask=in_range, other=0).to(tl.int64)
            k_pointers = K + tokens[:, None] * stride_ks + dims[None, :] * stride_kd
            v_pointers = V + tokens[:, None] * stride_vs + dims_v[None, :] * stride_vd
        else:
            first = k_start.to(tl.int64)
            k_pointers = K + first * stride_ks + (columns[:, None] * stride_ks + dims[None, :] * stride_kd)
            v_pointers = V + first * stride_vs + (columns[:, None] * stride_vs + dims_v[None, :] * stride_vd)
        k_mask = in_range[:, None]
        v_mask = in_range[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & (dims < D)[None, :]
        if BLOCK_DV != DV:
            v_mask = v_mask & (dims_v < DV)[None, :]
        k = tl.load(k_pointers, mask=k_mask, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = tl.where(in_range[None, :], logits, float("-inf"))
        if HAS_VERDICT:
            gain = tl.max(tl.where(in_block, tl.max(logits, 1) * scale - before, float("-inf")), 0)
            best = tl.maximum(best, gain)
        if PV_SKIP:
            if gain > -pv_skip:
                v = tl.load(v_pointers, mask=v_mask, other=0.0)
                peak, total, acc = _absorb(logits, scale, v, peak, total, acc, PRECISION)
        else:
            v = tl.load(v_pointers, mask=v_mask, other=0.0)
            peak, total, acc = _absorb(logits, scale, v, peak, total, acc, PRECISION)
        if HAS_VERDICT:
            last = finished if HAS_K_STARTS else t % TILES_K == TILES_K - 1
            # Against the initial peak, only the first readable block gains this much: it is needed whatever it holds.
            needed = last & ((best > threshold) | (best > 1e29))
            tl.atomic_or(Needed + j // 32, 1 << (j % 32), mask=needed, sem="relaxed")
            before = tl.where(last, peak, before)
            best = tl.where(last, float("-inf"), best)

    # Tail: every block that is not kept enters as one pooled key with the logarithm of its size.
    if HAS_TAIL:
        pooled = (b * heads + h) * k_blocks
        Kept += b * stride_mb + h * stride_mh + block.to(tl.int64) * stride_mq
        for first_block in range(0, k_blocks, BLOCK_N):
            blocks = first_block + columns
            in_range = blocks < k_blocks
            kept = tl.load(Kept + blocks, mask=in_range, other=1)
            bias = tl.load(LogCount + pooled + blocks, mask=in_range, other=float("-inf"))
            bias = tl.where(kept == 0, bias, float("-inf"))
            pooled_rows = (pooled + blocks)[:, None]
            k_mask = in_range[:, None]
            v_mask = in_range[:, None]
            if BLOCK_D != D:
                k_mask = k_mask & (dims < D)[None, :]
            if BLOCK_DV != DV:
                v_mask = v_mask & (dims_v < DV)[None, :]
            k = tl.load(PooledK + pooled_rows * D + dims[None, :], mask=k_mask, other=0.0)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
            v = tl.load(PooledV + pooled_rows * DV + dims_v[None, :], mask=v_mask, other=0.0)
            peak, total, acc = _absorb(logits, 1.0, v, peak, total, acc, PRECISION)

    # Tail per query block: one key, whose weight (base 2) and value are the same for all rows.
    if HAS_BLOCK_TAIL:
        own = (b * heads + h) * q_blocks + block
        weight = tl.load(TailWeight + own)
        value = tl.load(TailValue + own * DV + dims_v, mask=dims_v < DV, other=0.0)
        new_peak = tl.maximum(peak, weight)
        decay = tl.exp2(peak - new_peak)
        share = tl.exp2(weight - new_peak)
        total = total * decay + share
        acc = acc * decay[:, None] + share[:, None] * value[None, :]
        peak = new_peak

    # A row without any readable key (no valid plan has one) gives zeros and -inf instead of NaN.
    nothing = total == 0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    lse = tl.where(nothing, float("-inf"), (peak + tl.log2(total)) * 0.6931471805599453)
    o_mask = in_block[:, None]
    if BLOCK_DV != DV:
        o_mask = o_mask & (dims_v < DV)[None, :]
    o_pointers = Out + b * stride_ob + h * stride_oh + rows[:, None] * stride_os + dims_v[None, :]
    tl.store(o_pointers, out.to(Out.dtype.element_ty), mask=o_mask)
    tl.store(Lse + (b * heads + h) * q_len + rows, lse, mask=in_block)


@triton.jit
def _count_tiles(Indices, KStarts, count, readable, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Key tiles that a list of ``count`` variable-size blocks needs; an empty block costs one masked tile."""
    tiles = 0
    for first in range(0, count, 128):
        items = first + tl.arange(0, 128)
        mask = items < count
        j = tl.load(Indices + items, mask=mask, other=0).to(tl.int32)
        k_start = tl.load(KStarts + j)
        size = tl.minimum(tl.load(KStarts + j + 1), readable) - k_start
        per_block = tl.maximum((size + BLOCK_N - 1) // BLOCK_N, 1)
        tiles += tl.sum(tl.where(mask, per_block, 0))
    return tiles


@triton.jit
def _listed_keys(Indices, KStarts, KeyEnds, count, ranks, mask, SEARCH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Positions of the keys ``ranks [N]`` of a row's list, which runs from block to block without gaps."""
    low = tl.zeros_like(ranks)
    high = low + count - 1
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        behind = tl.load(KeyEnds + middle, mask=mask, other=0) <= ranks
        low = tl.where(behind, tl.minimum(middle + 1, high), low)
        high = tl.where(behind, high, middle)
    before = tl.load(KeyEnds + low - 1, mask=mask & (low > 0), other=0)
    j = tl.load(Indices + low, mask=mask, other=0).to(tl.int32)
    return tl.load(KStarts + j, mask=mask, other=0) + ranks - before
