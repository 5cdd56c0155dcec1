// The keys of one item of MLA decode: which tiles in which order, and where their rows lie.
#pragma once

#include <attention/config.cuh>
#include <attention/decode_work.cuh>
#include <tile/copy.cuh>

// What a split visits: the last tile of all and the first one of all, which are seeds of votes,
// then its other tiles from the last one down.  Seeds of other splits come before all, if they are
// scored.
struct SeedsFirst {
  TileDeal deal;
  int32 foreign;  // seeds of other splits

  DEVICE SeedsFirst(const TileDeal& deal, bool seeded) : deal(deal), foreign(0) {
    if (seeded && deal.count > 0) {
      foreign = seeds() - (deal.rank == 0) - (deal.tiles() > 1 && owns_first());
    }
  }

  DEVICE int32 seeds() const { return minimum(deal.tiles(), 2); }
  DEVICE int32 visits() const { return foreign + deal.count; }
  // Whether the tile of the first keys is this split's.
  DEVICE bool owns_first() const { return deal.at(deal.count - 1) == deal.first; }

  DEVICE int32 tile(int32 visit) const {
    if (visit < foreign) return visit == 0 && deal.rank != 0 ? deal.last : deal.first;
    const int32 own = visit - foreign, second = deal.rank == 0;
    if (!owns_first() || own < second) return deal.at(own);
    return own == second ? deal.first : deal.at(own - 1);
  }
};

template <MlaPortableConfig config>
struct MlaKeys {
  const AttentionParams& params;
  int32 request;  // or token
  int32 count;    // keys, or entries, that some row sees
  SeedsFirst order;

  DEVICE MlaKeys(const AttentionParams& params, const DecodeWork& work, int32 count)
      : params(params),
        request(work.request),
        count(count),
        order(TileDeal({0, count}, config.block_kv, work.split, work.splits), config.skip_softmax) {
  }

  DEVICE int32 visits() const { return order.visits(); }
  DEVICE int32 first_key(int32 visit) const { return order.tile(visit) * config.block_kv; }

  // The page of a key, or its position in the cache; −1: nowhere.
  DEVICE int32 entry(int32 key) const {
    if (key >= count) return -1;
    // The request's pages, or the token's positions.
    const int32* table = params.block_tables + recomputed(request) * params.block_table_stride;
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
    if (next >= keys.visits()) return;
    const int32 first_key = keys.first_key(next);
#pragma unroll
    for (int32 pass = 0; pass < passes; ++pass)
      entries[pass] = keys.entry(first_key + row_of(pass));
  }
  DEVICE void request(Tile tile) {
    if (next >= keys.visits()) return;
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
