// The keys of one item of MLA decode: which tiles in which order, and where their rows lie.
#pragma once

#include <attention/config.cuh>
#include <attention/decode_work.cuh>
#include <tile/copy.cuh>

// A split's tiles: the last one of all and the first one of all, where they are its own, then the
// others from the last one down.
struct EndsFirst {
  TileDeal deal;

  DEVICE int32 step(int32 visit) const {
    const int32 last = deal.count - 1, second = deal.rank == 0;
    const bool has_first = deal.tiles() > 1 && deal.rank + last * deal.stride == deal.tiles() - 1;
    if (!has_first || visit < second) return visit;
    return visit == second ? last : visit - 1;
  }
  DEVICE int32 tile(int32 visit) const { return deal.at(step(visit)); }
};

template <MlaPortableConfig config>
struct MlaKeys {
  const AttentionParams& params;
  const int32* table;  // the request's pages; sparse: the token's positions
  int32 count;         // keys, or entries, that some row sees
  EndsFirst order;

  DEVICE MlaKeys(const AttentionParams& params, const DecodeWork& work, int32 count)
      : params(params),
        table(params.block_tables + work.request * params.block_table_stride),
        count(count),
        order{TileDeal({0, count}, config.block_kv, work.split, work.splits)} {}

  DEVICE int32 tiles() const { return order.deal.count; }
  DEVICE int32 first_key(int32 visit) const { return order.tile(visit) * config.block_kv; }

  // The page of a key, or its position in the cache; −1: nowhere.
  DEVICE int32 entry(int32 key) const {
    if (key >= count) return -1;
    const int32 found = table[config.sparse ? key : key >> params.page_shift];
    const int32 page = config.sparse ? found >> params.page_shift : found;
    return uint32(page) < uint32(params.pages) ? found : -1;
  }
  DEVICE const char* row(int32 key, int32 entry) const {
    const int32 page = config.sparse ? entry >> params.page_shift : entry;
    const int32 slot = (config.sparse ? entry : key) & ((1 << params.page_shift) - 1);
    return static_cast<const char*>(params.k) +
           (page * params.k_strides.outer + slot * params.k_strides.row) * 2;
  }
};

// Requests tiles one after the other; where the rows of the next one lie is looked up a tile ahead.
// Rows that are nowhere become zeros.
template <MlaPortableConfig config, typename Tile>
struct MlaLoader {
  static constexpr int32 rows_at_once = config.threads() / 8;
  static constexpr int32 passes = Tile::rows / rows_at_once;
  static_assert(Tile::rows % rows_at_once == 0, "every thread copies the same number of rows");

  const MlaKeys<config>& keys;
  int32 next = 0;  // visit
  int32 entries[passes];

  DEVICE explicit MlaLoader(const MlaKeys<config>& keys) : keys(keys) { look_up(); }

  DEVICE int32 row_of(int32 pass) const {
    return int32(recomputed(thread_index())) / 8 + pass * rows_at_once;
  }
  DEVICE void look_up() {
    if (next >= keys.tiles()) return;
    const int32 first_key = keys.first_key(next);
#pragma unroll
    for (int32 pass = 0; pass < passes; ++pass)
      entries[pass] = keys.entry(first_key + row_of(pass));
  }
  DEVICE void request(Tile tile) {
    if (next >= keys.tiles()) return;
    const int32 column = thread_index() % 8, first_key = keys.first_key(next);
#pragma unroll
    for (int32 pass = 0; pass < passes; ++pass) {
      const int32 row = row_of(pass), entry = entries[pass];
      const char* source = keys.row(first_key + row, entry) + column * 16;
#pragma unroll
      for (int32 chunk = 0; chunk < Tile::chunks; ++chunk)
        cp_async_16(tile.at(chunk, row, column), source + chunk * row_bytes, entry >= 0);
    }
    ++next;
    look_up();
  }
};
