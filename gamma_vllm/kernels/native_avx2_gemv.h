// gemv: products of a few tokens' activations (decode), code by code, for CPUs with AVX2. What is summed over a group
// are integers, and that sum is multiplied by the scales of the weight and of the activations.

#pragma once

#include "native_avx2_codes.h"

namespace {

constexpr long kPrefetchBytes = 8192;  // how far ahead of their use bytes are prefetched
constexpr int kChunk = 8;      // groups whose scales are made ready at a time

constexpr int codes_in_lane(int bits) { return bits == 2 ? 8 : bits <= 4 ? 4 : 2; }

// 16 lanes, each with kCodes neighbouring codes that end with its highest bit; they are taken out of all lanes one after
// the other, so the activations are wanted in the order [codes, 16] instead of [16, codes].
template <int BITS>
struct Step {
    static constexpr int kCodes = codes_in_lane(BITS), kColumns = kLanes * kCodes;
    static constexpr int kBytes = kColumns * BITS / 8, kHalf = kBytes / 2;
    static constexpr int kFirst = 16 - kCodes * BITS;  // where the first code of a lane begins
    static constexpr int kReach = kHalf + 16;          // bytes that are read
    __m256i bytes, factors;

    Step() {
        alignas(32) uint8_t index[32];
        alignas(32) uint16_t factor[16];
        for (int lane = 0; lane < 16; lane++) {
            const int bit = lane % 8 * kCodes * BITS;
            index[2 * lane] = uint8_t(bit / 8);
            index[2 * lane + 1] = uint8_t(bit / 8 + 1 < 16 ? bit / 8 + 1 : 0x80);
            factor[lane] = uint16_t(1 << (kFirst - bit % 8 < 0 ? 0 : kFirst - bit % 8));
        }
        bytes = _mm256_load_si256((const __m256i*)index);
        factors = _mm256_load_si256((const __m256i*)factor);
    }

    // BOUNDED: nothing behind the `readable` bytes may be read, for they end the module.
    template <bool BOUNDED>
    GAMMA_INNER __m256i lanes(const uint8_t* from, long readable) const {
        if (BOUNDED && readable < kReach) {
            alignas(32) uint8_t bounded[kReach] = {0};
            std::memcpy(bounded, from, readable);
            return placed(load_halves(bounded, bounded + kHalf));
        }
        return placed(load_halves(from, from + kHalf));
    }

    GAMMA_INNER static __m256i code(__m256i lanes, int number) {
        const int shift = kFirst + number * BITS;
        const __m256i lowest = shift ? _mm256_srli_epi16(lanes, shift) : lanes;
        return number + 1 < kCodes ? _mm256_and_si256(lowest, _mm256_set1_epi16((1 << BITS) - 1)) : lowest;
    }

  private:
    GAMMA_INNER __m256i placed(__m256i raw) const {
        if (kFirst == 0) return raw;  // lanes are their own bits
        return _mm256_mullo_epi16(_mm256_shuffle_epi8(raw, bytes), factors);
    }
};

// Activations as the steps want them, padded with zeros to whole steps; of each group what they are to be multiplied by, and
// their sum.
template <int BITS>
class Activations {
    using Of = Step<BITS>;
    AlignedSpace<int16_t> values;
    AlignedSpace<float> numbers;
    int16_t* all;
    float* floats;
    long tokens;

  public:
    long stride, groups;  // of values, and of numbers of a token

    void prepare(const uint16_t* x, long count, long columns, long group_size) {
        tokens = count;
        stride = (columns + Of::kColumns - 1) / Of::kColumns * Of::kColumns;
        groups = (columns / group_size + kChunk - 1) / kChunk * kChunk;
        all = values.of(tokens * stride + columns);
        floats = numbers.of(2 * tokens * groups);
        std::fill(floats, floats + 2 * tokens * groups, 0.0f);
        int16_t* const plain = all + tokens * stride;
        for (long token = 0; token < tokens; token++, x += columns) {
            for (long k = 0, group = token * groups; k < columns; k += group_size, group++) {
                const float scale = quantize_group(x + k, group_size, plain + k);
                __m256i sum = _mm256_setzero_si256();
                for (long i = k; i < k + group_size; i += kLanes) {
                    const __m256i next = _mm256_loadu_si256((const __m256i*)(plain + i));
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(next, _mm256_set1_epi16(1)));
                }
                floats[group] = scale;
                floats[tokens * groups + group] = scale * sum_of_lanes(_mm256_cvtepi32_ps(sum));
            }
            int16_t* to = all + token * stride;
            for (long k = 0; k < stride; k += Of::kColumns, to += Of::kColumns) {
                const long there = std::min<long>(Of::kColumns, columns - k);
                for (int code = 0; code < Of::kCodes; code++) {
                    for (int lane = 0; lane < kLanes; lane++) {
                        const int from = lane * Of::kCodes + code;
                        to[code * kLanes + lane] = from < there ? plain[k + from] : int16_t(0);
                    }
                }
            }
        }
    }

    const int16_t* of(long token) const { return all + token * stride; }
    const float* scales_of(long token) const { return floats + token * groups; }
    const float* sums_of(long token) const { return floats + (tokens + token) * groups; }
};

GAMMA_INNER void put(float* to, float value) { *to = value; }
GAMMA_INNER void put(uint16_t* to, float value) { *to = value == value ? to_bf16(value) : 0x7FC0; }

// Prefetches `bytes` from an address that is used kPrefetchBytes later.
GAMMA_INNER void prefetch(const uint8_t* from, long bytes) {
    for (long at = 0; at < bytes; at += 64) _mm_prefetch((const char*)from + at, _MM_HINT_T0);
}

// Scales and zero points of 8 groups that follow each other, as floats. Where they are BOUNDED those behind the last group
// of the row are zeros; else they are another row's, and their activations are zeros.
template <bool BOUNDED>
GAMMA_INNER void read_scales(const Weight& w, long row, long group, __m256& scales, __m256& zeros) {
    const long at = row * w.groups() + group;
    const uint16_t* halves = w.scale + at;
    const uint8_t* points = w.zero_point + at;
    alignas(16) uint16_t few_halves[8] = {0};
    alignas(8) uint8_t few_points[8] = {0};
    if (BOUNDED) {
        const long there = std::min(w.groups() - group, 8L);
        std::memcpy(few_halves, halves, there * sizeof(uint16_t));
        halves = few_halves;
        if (w.zero_point) std::memcpy(few_points, points, there);
        points = few_points;
    }
    scales = widen(_mm_loadu_si128((const __m128i*)halves), w.scale_is_bf16);
    if (w.zero_point) {
        zeros = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)points)));
    } else {
        zeros = _mm256_set1_ps(float(1 << (w.bits - 1)));  // a symmetric module has its zero point in the middle
    }
}

// The sums of four vectors' lanes.
GAMMA_INNER __m128 sums_of_lanes(const __m256* v) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// R neighbouring rows of the weight times M activations from `token` on, to out[M, rows].
template <int BITS, int M, int R, bool BOUNDED, typename Out>
void multiply_rows(const Weight& w, const Step<BITS>& step, long row, const Activations<BITS>& all, long token, Out* out,
                   long out_stride) {
    using Of = Step<BITS>;
    const long row_bytes = w.columns * BITS / 8, groups = w.groups();
    const uint8_t* const begin = w.packed + row * row_bytes;
    const int16_t* const x = all.of(token);
    const float *const scales_of_x = all.scales_of(token), *const sums_of_x = all.sums_of(token);
    const int in_step = int(std::max(1L, Of::kColumns / w.group_size));  // groups in a step
    const long columns = std::max<long>(Of::kColumns, w.group_size);     // between two scales
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i group_of_lane = _mm256_srli_epi32(_mm256_mullo_epi32(lane, _mm256_set1_epi32(in_step)), 3);
    __m256 total[R][M];
    alignas(32) float scales[R][M][kChunk + 8];
    for (int r = 0; r < R; r++) {
        for (int m = 0; m < M; m++) {
            total[r][m] = _mm256_setzero_ps();
            _mm256_storeu_ps(scales[r][m] + kChunk, _mm256_setzero_ps());
        }
    }
    long k = 0;
    for (long first = 0; first < groups; first += kChunk) {
        for (int r = 0; r < R; r++) {
            __m256 of_weight, zeros;
            read_scales<BOUNDED>(w, row + r, first, of_weight, zeros);
            for (int m = 0; m < M; m++) {
                const long at = m * all.groups + first;
                const __m256 off = _mm256_mul_ps(zeros, _mm256_loadu_ps(sums_of_x + at));
                total[r][m] = _mm256_fnmadd_ps(off, of_weight, total[r][m]);
                _mm256_store_ps(scales[r][m], _mm256_mul_ps(of_weight, _mm256_loadu_ps(scales_of_x + at)));
            }
        }
        const long end = std::min(w.columns, (first + kChunk) * w.group_size);
        for (long group = 0; k < end; group += in_step) {
            __m256i sums[R][M];
            each<R * M>([&](int i) GAMMA_LAMBDA { sums[i / M][i % M] = _mm256_setzero_si256(); });
            for (const long stop = k + columns; k < stop; k += Of::kColumns) {
                // In the order of memory, so that the caches' own prefetchers see one stream.
                prefetch(begin + kPrefetchBytes + k * R * BITS / 8, R * Of::kBytes);
                __m256i lanes[R];
                each<R>([&](int r) GAMMA_LAMBDA {
                    const long at = r * row_bytes + long(size_t(k) * BITS / 8);
                    lanes[r] = step.template lanes<BOUNDED>(begin + at, row_bytes - k * BITS / 8);
                });
                each<Of::kCodes>([&](int code) GAMMA_LAMBDA {
                    __m256i codes[R];
                    each<R>([&](int r) GAMMA_LAMBDA { codes[r] = step.code(lanes[r], code); });
                    each<M>([&](int m) GAMMA_LAMBDA {
                        const __m256i values = _mm256_load_si256((const __m256i*)(x + m * all.stride + k + code * kLanes));
                        each<R>([&](int r) GAMMA_LAMBDA { sums[r][m] = plus_products(sums[r][m], codes[r], values); });
                    });
                });
            }
            each<R * M>([&](int i) GAMMA_LAMBDA {
                const float* const from = scales[i / M][i % M] + group;
                const __m256 scale = in_step == 1 ? _mm256_broadcast_ss(from)
                                                  : _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), group_of_lane);
                __m256& all_groups = total[i / M][i % M];
                all_groups = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i / M][i % M]), scale, all_groups);
            });
        }
    }
    // One way of adding up for all R and M: where a module is cut, and how many tokens there are, must not be seen.
    constexpr int kFours = (R * M + 3) / 4;
    alignas(16) float of_rows[4 * kFours];
    const __m256* const vectors = &total[0][0];
    for (int i = 0; i < 4 * kFours; i += 4) {
        __m256 four[4];
        for (int j = 0; j < 4; j++) four[j] = vectors[std::min(i + j, R * M - 1)];
        _mm_store_ps(of_rows + i, sums_of_lanes(four));
    }
    for (int r = 0; r < R; r++) {
        for (int m = 0; m < M; m++) put(out + m * out_stride + row + r, of_rows[r * M + m]);
    }
}

// M activations from `token` on, by all threads: each takes its rows and does not wait for the others.
template <int BITS, int M, typename Out>
void multiply_all(const Weight& w, const Step<BITS>& step, const Activations<BITS>& all, long token, Out* out,
                  long out_stride) {
    constexpr int R = M == 1 ? 4 : M == 2 ? 2 : 1;
    // From the rows behind `safe` a whole load could reach behind the weight, or behind the scales.
    const long row_bytes = w.columns * BITS / 8, last_step = (w.columns - 1) / step.kColumns * step.kBytes;
    const long over = last_step + step.kReach - row_bytes, over_scales = all.groups - w.groups();
    const auto rows_of = [](long size, long row) { return size > 0 ? (size + row - 1) / row : 0; };
    const long unsafe = std::max(rows_of(over, row_bytes), rows_of(over_scales, w.groups()));
    const long safe = std::max(0L, w.rows - unsafe) / R * R;
#pragma omp for schedule(static) nowait
    for (long row = 0; row < safe; row += R) {
        multiply_rows<BITS, M, R, false>(w, step, row, all, token, out, out_stride);
    }
#pragma omp for schedule(static) nowait
    for (long row = safe; row < w.rows; row++) {
        multiply_rows<BITS, M, 1, true>(w, step, row, all, token, out, out_stride);
    }
}

// x [tokens, columns] in bfloat16 times the weight: out [tokens, rows], float32 or bfloat16. Within a parallel region, by
// all.
template <int BITS, typename Out>
void gemv(const Weight& w, const uint16_t* x, long tokens, Out* out, long out_stride) {
    thread_local Activations<BITS> all;
    prefetch(w.packed, kPrefetchBytes);  // meanwhile the activations are made ready
    all.prepare(x, tokens, w.columns, w.group_size);
    const Step<BITS> step;
    for (long token = 0; token < tokens;) {
        Out* const place = out + token * out_stride;
        const long left = tokens - token;
        if (left >= 4) {
            multiply_all<BITS, 4>(w, step, all, token, place, out_stride);
            token += 4;
        } else if (left >= 2) {
            multiply_all<BITS, 2>(w, step, all, token, place, out_stride);
            token += 2;
        } else {
            multiply_all<BITS, 1>(w, step, all, token, place, out_stride);
            token += 1;
        }
    }
}

}  // namespace
