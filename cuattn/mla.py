"""MLA decode: few new tokens of each request over a paged cache of latent vectors."""

from __future__ import annotations

from typing import Any

from . import _call, _check, _check_mla, _check_tools, _ingest


def mla_decode(
    q: Any,
    kv_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    scale: Any,
    cu_seqlens_q: Any = None,
    out_scale: Any = None,
    sinks: Any = None,
    skip_softmax: Any = None,
    sparse_indices: Any = None,
    latent_dim: int | None = None,
    batch_invariant: bool | None = None,
    return_lse: bool = False,
    out: Any = None,
    lse: Any = None,
    out_dtype: Any = None,
    stream: Any = None,
) -> Any:
    """Multi-head latent attention of each request's newest tokens, absorbed into the latent space.

    All heads share one row per key: it is the key, and its first columns, the latent part, are the
    value too; the others are the rope part. Token i of a request that has n of them sees its keys
    up to ``seq_len - n + i``, so they are in the cache already; `append_mla_kv` puts them there.

    Parameters
    ----------
    q : array, ``[batch, heads, row]`` or ``[batch, q_len, heads, row]``
        One token of each request, or `q_len` of them; bfloat16 or float16, up to 128 heads. Its
        latent columns are multiplied by the up-projection of keys, the others are rotated. With
        `cu_seqlens_q`: ``[tokens, heads, row]``.
    kv_cache : array, ``[pages, page_size, row]``
        Latent and rope part of each key, of q's dtype: 512 + 64, 256 + 64 or 512 + 0 columns. Also
        with a head axis of 1 before or behind that of `page_size`, which is a power of two from 8.
        Rows start on 16 bytes.
    block_tables : array, int32 ``[batch, max_pages]``
        The pages of each request, in order. Entries past its length are never read; a page number
        outside the cache reads as zeros. With `sparse_indices` not read, and may be None.
    seq_lens : array, int32 ``[batch]``
        Length of each request in the cache, new tokens included. Read on the device: it may change
        between replays of a CUDA graph, up to ``max_pages * page_size`` where tables are read.
    scale : float or array of one float32
        Multiplies QKᵀ, above 0. No default: it is that of the layer before absorption, in
        DeepSeek's models ``192 ** -0.5`` times what the rope scaling adds. An array is read by the
        kernel.
    cu_seqlens_q : array, int32 ``[batch + 1]``, optional
        Prefix sums of the numbers of new tokens, where they differ.
    out_scale : float or array of one float32, optional
        Multiplies the output.
    sinks : array, float32 ``[heads]``, optional
        A logit per head, after scaling, that enters the denominator only.
    skip_softmax : SkipSoftmax, optional
        Leave out tiles of keys, or of entries of a list, whose weights would be negligible: their
        softmax and their part of the output. All rows of a vote have to agree: heads of a token,
        then the next one. No bytes are saved, since keys and values are the same; with 16 heads,
        where memory is the limit, nothing is gained. A scale factor is divided by the length of the
        request, however short its lists are.
    sparse_indices : array, int32 ``[batch, q_len, top_k]``, optional
        The keys of each token, instead of all that it sees: positions in the cache, ``page *
        page_size + slot``. Of q's form: also ``[batch, top_k]``, and with `cu_seqlens_q`
        ``[tokens, top_k]``; contiguous. `top_k` is a multiple of 64 up to 4096. A token that sees
        fewer keys than that uses as many of its first entries; all heads see all of them. An entry
        outside the cache is no key, one that is there twice counts twice.
    latent_dim : int, optional
        Columns of a value, 512 or 256. By default, what a row of the cache allows.
    batch_invariant : bool, optional
        Cut a request's keys into splits by its own length alone, so that its result has the same
        bits in every batch. By default the splits also depend on the size of the batch.
    return_lse : bool
        Return ``(out, lse)``.
    out : array, q's shape with the latent columns, optional
        Written in place and returned as it is.
    lse : array, float32, q's shape without its last axis, optional
        Written in place; returned if `return_lse`.
    out_dtype : dtype, optional
        bfloat16, float16 or float32; q's by default.
    stream : int or object with ``__cuda_stream__`` or ``ptr``, optional
        As in `decode`.

    Returns
    -------
    cupy.ndarray, or a tuple of them
        The output, still in the latent space; if asked for, the log-sum-exp of the kept scores
        (natural logarithm, sink included); and with ``SkipSoftmax(certificate=True)`` the share of
        its weight that each row lost, float32 of LSE's shape. A row that sees no key gives 0, −∞
        and 0.

    Raises
    ------
    ValueError, TypeError
        Before anything is launched, naming the argument, what came and what was wanted.

    Notes
    -----
    Results are the same to the bit from run to run and for every width of `block_tables`.

    On Hopper, rows of 512 + 64 columns have a kernel of their own, in pages of 16 to 128 tokens or,
    with `sparse_indices`, for more than 32 heads; all else runs the portable one. What is skipped
    depends on which it is: Hopper's votes are of 64 rows on tiles of 64 keys; portable ones of 32
    rows where more than 32 read the same keys and the shared memory holds a block of 64, of 16 rows
    otherwise, on tiles of 64 or, where two do not fit, 32 keys.

    References
    ----------
    DeepSeek-V2, arXiv 2405.04434. That a tile is loaded once and two groups of warps share the
    columns of its values is FlashMLA's idea (https://github.com/deepseek-ai/FlashMLA).
    Skip-softmax: BLASST, arXiv 2512.12087, with seeds shared by all splits.

    Examples
    --------
    >>> import cupy, cuattn                                                 # doctest: +SKIP
    >>> cache = cupy.zeros((10, 64, 576), "float16")                       # doctest: +SKIP
    >>> q = cupy.ones((1, 128, 576), "float16")                            # doctest: +SKIP
    >>> tables, lengths = cupy.array([[3, 7]], "i4"), cupy.array([100], "i4")  # doctest: +SKIP
    >>> cuattn.mla_decode(q, cache, tables, lengths, scale=192**-0.5).shape    # doctest: +SKIP
    (1, 128, 512)
    """
    launch = None if stream is None else _ingest.stream_handle(stream)
    q_view = _ingest.view(q, "q", launch)
    cache = _check_tools.mla_cache(_ingest.view(kv_cache, "kv_cache", launch, q_view))
    lengths = _ingest.view(seq_lens, "seq_lens", launch, q_view)
    latent = _check_mla.latent_dim(latent_dim)
    sparse = sparse_indices is not None
    _check_mla.keys_given(block_tables, sparse_indices)
    tables = None
    if block_tables is not None:
        tables = _ingest.view(block_tables, "block_tables", launch, q_view)
    if sparse:
        if tables is not None:
            _check.tables(tables, lengths, q_view)
        tables = _ingest.view(sparse_indices, "sparse_indices", launch, q_view)
    assert tables is not None
    views: tuple[Any, ...] = (q_view, cache, tables, lengths)
    ends_at = 0
    if cu_seqlens_q is not None:
        ends = _ingest.view(cu_seqlens_q, "cu_seqlens_q", launch, q_view)
        views, ends_at = (*views, ends), ends.pointer
    pointers = (
        q_view.pointer,
        cache.pointer,
        cache.pointer,
        ends_at,
        0,
        lengths.pointer,
        tables.pointer,
    )
    given = (
        True,
        -1,
        scale,
        out_scale,
        0.0,
        sinks,
        skip_softmax,
        out,
        lse,
        out_dtype,
        batch_invariant,
    )
    return _call.attend(
        _call.mla(latent, sparse), views, pointers, given, return_lse, launch, "HND"
    )
