// Where the splits of an item's rows leave their parts, and who merges them.
#pragma once

#include <attention/decode_work.cuh>
#include <attention/partial.cuh>
#include <attention/row_result.cuh>
#include <ptx/atomic.cuh>

// Which row of q an item's row is.
DEVICE QueryRow query_row(const AttentionParams& params, const DecodeWork& work, int32 row) {
  const QueryRow first{work.request, work.q_start, 0, work.kv_head * params.group};
  return TokenRows{first, params.group}.at(work.first_row + row);
}

// A row's parts: of split 0 with the first items, of the others after all of those and after the
// others of the requests before.
template <int32 block_rows, typename Request>
DEVICE GlobalParts parts_of(const DecodeSchedule<block_rows, Request>& schedule,
                            const DecodeWork& work, int32 row, int32 columns) {
  const AttentionParams& params = schedule.params;
  const int32 blocks = schedule.row_blocks(Request(params, work.request));
  const int32 second = schedule.first_items() + schedule.more_items_before(work.request) +
                       work.kv_head * blocks + work.first_row / block_rows;
  return {.out = params.partial_out,
          .rows = static_cast<PartialRow*>(params.partial_rows),
          .columns = columns,
          .first = int64(work.place) * block_rows + row,
          .second = int64(second) * block_rows + row,
          .stride = int64(blocks) * params.kv_heads * block_rows};
}

// Whether the last split to arrive merges all, or a kernel of its own does.
DEVICE bool merged_by_block(const AttentionParams& params) { return params.splitting == 1; }

// Whether this thread's block is the last of its item's splits to arrive; one thread asks.
DEVICE bool arrives_last(const AttentionParams& params, const DecodeWork& work) {
  const uint32 last = work.splits - 1;
  return atomic_count(params.arrivals + work.place, last) == last;
}
