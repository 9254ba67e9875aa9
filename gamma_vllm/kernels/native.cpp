// Products of activations with weights of 2 to 8 bits, read as the checkpoint stores them. For CPUs with AVX-512 VBMI and
// BF16. Compiled by native.py on first use; no library is needed.

#include "native_few.h"
#include "native_many.h"

// Both take weights as native.py lays them out, side by side in one layer of `columns` activations, and return 0, or -1
// for a width that they do not know.

template <typename Out>
int multiply_few(const Weight* weights, long count, const uint16_t* x, long tokens, Out* out, long out_stride) {
    int status = 0;
#pragma omp parallel
    for (long i = 0, start = 0; i < count; start += weights[i++].rows) {
        const Weight& w = weights[i];
        Out* place = out + start;
        switch (w.bits) {
            case 2: multiply_few<2>(w, x, tokens, place, out_stride); break;
            case 3: multiply_few<3>(w, x, tokens, place, out_stride); break;
            case 4: multiply_few<4>(w, x, tokens, place, out_stride); break;
            case 5: multiply_few<5>(w, x, tokens, place, out_stride); break;
            case 6: multiply_few<6>(w, x, tokens, place, out_stride); break;
            case 7: multiply_few<7>(w, x, tokens, place, out_stride); break;
            case 8: multiply_few<8>(w, x, tokens, place, out_stride); break;
            default: status = -1;
        }
    }
    return status;
}

// x [tokens, columns] in bfloat16 to out [tokens, rows of all weights] in bfloat16 or float32, exact but for sums. 2 to 8
// bits.
extern "C" int gamma_multiply_few(const Weight* weights, long count, const uint16_t* x, long tokens, void* out,
                                  long out_stride, int to_bfloat16) {
    if (to_bfloat16) return multiply_few(weights, count, x, tokens, (uint16_t*)out, out_stride);
    return multiply_few(weights, count, x, tokens, (float*)out, out_stride);
}

// The same to bfloat16, with weights rounded to bfloat16. 2 to 8 and 16 bits.
extern "C" int gamma_multiply_many(const Weight* weights, long count, const uint16_t* x, long tokens, uint16_t* out,
                                   long out_stride) {
    int status = 0;
#pragma omp parallel
    for (long i = 0, start = 0; i < count; start += weights[i++].rows) {
        const Weight& w = weights[i];
        uint16_t* place = out + start;
        if (w.bits == 16) {
            const uint16_t* dense = (const uint16_t*)w.packed;
            const auto fill = [&](long row, long begin, long end, uint16_t* to) {
                std::memcpy(to, dense + row * w.columns + begin, (end - begin) * sizeof(uint16_t));
            };
            multiply_many(w, fill, x, tokens, place, out_stride);
        } else if (!with_unpacker(w.bits, [&](const auto& unpacker) {
                       const auto fill = [&](long row, long begin, long end, uint16_t* to) {
                           unpacker.dequantize(w, row, begin, end, to);
                       };
                       multiply_many(w, fill, x, tokens, place, out_stride);
                   })) {
            status = -1;
        }
    }
    return status;
}

// The whole weight as [rows, columns] in bfloat16 or float32.
extern "C" int gamma_dequantize(const Weight* weight, void* out, int to_bfloat16) {
    const Weight& w = *weight;
    const bool known = with_unpacker(w.bits, [&](const auto& unpacker) {
#pragma omp parallel for schedule(static)
        for (long row = 0; row < w.rows; row++) {
            if (to_bfloat16) {
                unpacker.dequantize(w, row, 0, w.columns, (uint16_t*)out + row * w.columns);
            } else {
                unpacker.dequantize(w, row, 0, w.columns, (float*)out + row * w.columns);
            }
        }
    });
    return known ? 0 : -1;
}
