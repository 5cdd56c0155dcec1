// Looks for entries of tables and lengths that no call may hold; reports one a request, the first.
//
// Grid:    one warp for each request.  Its lengths come first, then its pages, 32 at a time.
#include <core/device.cuh>
#include <core/math.cuh>
#include <core/types.cuh>

struct ValidateConfig {
  int32 warps = 4;  // of a block

  DEVICE constexpr int32 threads() const { return warps * warp_size; }
};
constexpr ValidateConfig config{CUATTN_CONFIG};

// What is wrong (twin: Fault in _tool_params.py).
enum class Fault : int32 {
  none,
  start,       // cu_seqlens[0] is not 0
  decreasing,  // cu_seqlens[request + 1] is below cu_seqlens[request]
  past_end,    // cu_seqlens[request + 1] is above the number of tokens
  length,      // seq_lens[request] is not in [0, max_pages · page_size]
  too_new,     // seq_lens[request] is below the number of the request's new tokens
  page,        // block_tables[request, entry] is not in [0, pages)
};

struct alignas(16) Finding {
  Fault fault;
  int32 where;  // which cu_seqlens, or which entry of the table
  int32 value;
  int32 other;  // what `value` was compared with
};

constexpr int32 sums = 3;  // cu_seqlens of queries, keys and new tokens

// What the kernel is told at launch (twin: _tool_params.py).
struct ValidateParams {
  const int32* block_tables;      // [batch, max_pages]; null: nothing is paged
  const int32* seq_lens;          // [batch]; null with block_tables
  const int32* cu_seqlens[sums];  // [batch + 1] each, or null
  Finding* findings;              // [batch]
  int64 block_table_stride;
  int32 tokens[sums];  // what each of cu_seqlens may reach
  int32 new_each;      // tokens that are new in every request where cu_seqlens do not say it
  int32 batch, max_pages, page_shift, pages;
};
static_assert(sizeof(Finding) == 16 && sizeof(ValidateParams) == 88);

DEVICE Finding check_sums(const ValidateParams& params, int32 request) {
  for (int32 i = 0; i < sums; ++i) {
    if (!params.cu_seqlens[i]) continue;
    const int32 begin = params.cu_seqlens[i][request], end = params.cu_seqlens[i][request + 1];
    if (request == 0 && begin != 0) return {Fault::start, i, begin, 0};
    if (end < begin) return {Fault::decreasing, i, end, begin};
    if (end > params.tokens[i]) return {Fault::past_end, i, end, params.tokens[i]};
  }
  return {};
}

DEVICE Finding check_length(const ValidateParams& params, int32 request) {
  const int32 length = params.seq_lens[request];
  const int32 most = params.max_pages << params.page_shift;
  if (length < 0 || length > most) return {Fault::length, 0, length, most};
  const int32* new_tokens = params.cu_seqlens[sums - 1];
  const int32 fresh = new_tokens ? new_tokens[request + 1] - new_tokens[request] : params.new_each;
  if (length < fresh) return {Fault::too_new, 0, length, fresh};
  return {};
}

// Every lane looks at its own entries; the first wrong one of the request is that of the first lane
// in the first round with any.
DEVICE Finding check_pages(const ValidateParams& params, int32 request) {
  const int32* table = params.block_tables + request * params.block_table_stride;
  const int32 entries = ((params.seq_lens[request] - 1) >> params.page_shift) + 1;
  for (int32 first = 0; first < entries; first += warp_size) {
    const int32 entry = first + lane_index();
    const int32 page = entry < entries ? table[entry] : 0;
    const uint32 wrong = warp_ballot(uint32(page) >= uint32(params.pages));
    if (wrong == 0) continue;
    const int32 lane = count_ones((wrong & -wrong) - 1);  // below the lowest bit that is set
    return {Fault::page, first + lane, shuffle(page, lane), params.pages};
  }
  return {};
}

KERNEL void __launch_bounds__(config.threads())
    validate(const __grid_constant__ ValidateParams params) {
  const int32 request = block_index() * config.warps + warp_index();
  if (request >= params.batch) return;
  Finding finding = check_sums(params, request);
  if (finding.fault == Fault::none && params.seq_lens) finding = check_length(params, request);
  if (finding.fault == Fault::none && params.block_tables) finding = check_pages(params, request);
  if (lane_index() == 0) params.findings[request] = finding;
}
