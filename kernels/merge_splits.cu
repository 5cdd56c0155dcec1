// Merges the parts of requests that decode has cut into splits, where these are too many for the
// last of their blocks to do it alone.  Of a request that is not cut, decode has written the
// result.
//
// Grid:    a block to every row of every block of rows and kv head, a warp to 128 of its columns.
// Memory:  a warp has 16 parts on their way at once, 512 bytes of each.
#include <attention/config.cuh>
#include <attention/decode_work.cuh>
#include <attention/partial.cuh>
#include <attention/row_result.cuh>
#include <attention/sparse_token.cuh>
#include <attention/split_parts.cuh>

constexpr MergeSplitsConfig config{CUATTN_CONFIG};

constexpr int32 warp_columns = 128, parts_at_once = 16;

KERNEL void __launch_bounds__(config.threads())
    merge_splits(const __grid_constant__ AttentionParams params) {
  const DecodeSchedule<config.rows, RequestKind<config.sparse>::Type> schedule(params);
  const int32 tokens = config.sparse ? 1 : params.q_len;
  const int32 rows = minimum(config.rows, tokens * params.group);  // of a block, at most
  const int32 row = block_index() % rows, first_column = warp_index() * warp_columns;
  const DecodeWork work = schedule.find(block_index() / rows);
  if (!work.exists || work.splits == 1 || row >= work.rows) return;
  GlobalParts parts = parts_of(schedule, work, row, config.columns);
  parts.out += first_column;
  const auto merged = merge_row<warp_columns, parts_at_once>(parts, work.splits);
  write_row<Element<config.output>>(params, row_of<config.sparse>(params, work, row), merged,
                                    first_column);
}
