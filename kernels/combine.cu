// Merges the partial results of decode: O = Σ wᵢ Oᵢ / Σ wᵢ lᵢ over the splits of a request.
//
// Grid:   one warp for one row of q (a token and a head).
// Waits:  for nothing; requests of one split were finished by decode and are passed over.
#include <attention/config.cuh>
#include <attention/decode_work.cuh>
#include <attention/partial.cuh>
#include <attention/row_result.cuh>

constexpr CombineConfig config{CUATTN_CONFIG};

using Output = Element<config.output>;

KERNEL void __launch_bounds__(config.threads())
    combine(const __grid_constant__ AttentionParams params) {
  const int32 row = block_index() * config.warps + warp_index();
  int32 request = 0, token = row / params.q_heads;
  const auto tokens_in = [&](int32 candidate) { return DecodeRequest(params, candidate).q_len; };
  if (!find_request(params.batch, tokens_in, request, token)) return;
  request = warp_uniform(request);
  token = warp_uniform(token);
  const DecodeRequest here(params, request);
  if (here.splits == 1) return;
  const QueryRow place{request, here.q_start, token, row % params.q_heads};
  write_row<Output>(params, place, merge_row<config.head_dim_v>(place.parts(params), here.splits));
}
