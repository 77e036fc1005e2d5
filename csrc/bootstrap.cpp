// The prompts of a few resamples are drawn and counted; then the sums of eight columns at a time, which stay in registers, take
// in a few prompts, whose counts and values stay in the cache. A resample's sum adds count * value prompt by prompt, in pieces
// of a fixed size: neither threads nor vectors change its order.

#include "evaluator.hpp"

#include <cstring>

namespace {

constexpr Index columns_at_once = 8, prompts_at_once = 128, resamples_at_once = 16;

template <Path path> constexpr int vector_bytes = path == Path::portable ? 16 : path == Path::avx2 ? 32 : 64;

// splitmix64 (Steele, Lea, Flood 2014): a Weyl sequence and a bijective mixer, defined by integer arithmetic alone.
std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Each resample has a generator of its own, started from (seed, resample), so that its draws depend on neither the number of
// resamples nor the order in which they are drawn.
struct SplitMix64 {
    std::uint64_t state;
    SplitMix64(std::uint64_t seed, Index resample) : state(mix(mix(seed) + static_cast<std::uint64_t>(resample))) {}
    std::uint32_t next32() { return static_cast<std::uint32_t>(mix(state += 0x9e3779b97f4a7c15u) >> 32); }

    // Unbiased, from 0 to bound - 1: Lemire (2019), "Fast random integer generation in an interval".
    std::uint32_t below(std::uint32_t bound) {
        std::uint64_t product = std::uint64_t{next32()} * bound;
        if (static_cast<std::uint32_t>(product) < bound) {
            const std::uint32_t threshold = (0u - bound) % bound;  // 2^32 mod bound
            while (static_cast<std::uint32_t>(product) < threshold) product = std::uint64_t{next32()} * bound;
        }
        return static_cast<std::uint32_t>(product >> 32);
    }
};

// totals (resamples, columns) += counts (resamples, prompts_at_once) * values (prompts, columns), so many at once.
template <Path path> INLINE void add_products(const double *counts, const double *values, Index prompts, double *totals) {
    using Doubles = typename LanesOf<double, vector_bytes<path>>::type;
    // Enough sums for additions not to wait for each other, but no more than there are registers.
    constexpr int width = vector_bytes<path> / 8, parts = columns_at_once / width, rows = 2 * width;
    for (Index first = 0; first < resamples_at_once; first += rows) {
        Doubles sums[rows][parts] = {};
        for (Index prompt = 0; prompt < prompts; ++prompt)
            for (int part = 0; part < parts; ++part) {
                Doubles value;
                std::memcpy(&value, values + columns_at_once * prompt + width * part, sizeof value);
                for (int row = 0; row < rows; ++row)
                    sums[row][part] += counts[prompts_at_once * (first + row) + prompt] * value;
            }
        for (int row = 0; row < rows; ++row)
            for (int part = 0; part < parts; ++part)
                for (int lane = 0; lane < width; ++lane)
                    totals[columns_at_once * (first + row) + width * part + lane] += sums[row][part][lane];
    }
}

void add_products_portable(const double *counts, const double *values, Index prompts, double *totals) {
    add_products<Path::portable>(counts, values, prompts, totals);
}
#if HAS_X86_CODE
AVX2 void add_products_avx2(const double *counts, const double *values, Index prompts, double *totals) {
    add_products<Path::avx2>(counts, values, prompts, totals);
}
AVX512 void add_products_avx512(const double *counts, const double *values, Index prompts, double *totals) {
    add_products<Path::avx512>(counts, values, prompts, totals);
}
#endif

}  // namespace

void bootstrap(const double *sums, Index prompts, Index columns, Index resamples, std::uint64_t seed, Path path, Index threads,
               double *totals) {
    auto *add_products = add_products_portable;
#if HAS_X86_CODE
    if (path == Path::automatic) path = fastest_path();
    if (path == Path::avx2) add_products = add_products_avx2;
    if (path == Path::avx512) add_products = add_products_avx512;
#endif
    const Index blocks = (columns + columns_at_once - 1) / columns_at_once;
    std::vector<double> values(blocks * prompts * columns_at_once);  // (blocks, prompts, columns of the block)
    for (Index prompt = 0; prompt < prompts; ++prompt)
        for (Index column = 0; column < columns; ++column)
            values[(column / columns_at_once * prompts + prompt) * columns_at_once + column % columns_at_once] =
                sums[prompt * columns + column];
    const double nanoseconds = (2.0 + 0.3 * blocks) * prompts * resamples;
    const Index groups = (resamples + resamples_at_once - 1) / resamples_at_once;
    run_parallel(groups, count_threads(threads, nanoseconds), [&](Queue &queue) {
        std::vector<std::int32_t> drawn(prompts * resamples_at_once);
        std::vector<double> counts(prompts_at_once * resamples_at_once), sums(blocks * resamples_at_once * columns_at_once);
        for (Index group; queue.take(group);) {
            const Index first = group * resamples_at_once, size = std::min(resamples - first, resamples_at_once);
            std::fill(drawn.begin(), drawn.end(), 0);
            for (Index row = 0; row < size; ++row) {
                SplitMix64 generator(seed, first + row);
                for (Index draw = 0; draw < prompts; ++draw)
                    ++drawn[row * prompts + generator.below(static_cast<std::uint32_t>(prompts))];
            }
            std::fill(sums.begin(), sums.end(), 0.0);
            for (Index begin = 0; begin < prompts; begin += prompts_at_once) {
                const Index count = std::min(prompts - begin, prompts_at_once);
                for (Index row = 0; row < resamples_at_once; ++row)
                    std::copy_n(&drawn[row * prompts + begin], count, &counts[row * prompts_at_once]);
                for (Index block = 0; block < blocks; ++block)
                    add_products(counts.data(), &values[(block * prompts + begin) * columns_at_once], count,
                                 &sums[block * resamples_at_once * columns_at_once]);
            }
            for (Index row = 0; row < size; ++row)
                for (Index column = 0; column < columns; ++column)
                    totals[(first + row) * columns + column] =
                        sums[(column / columns_at_once * resamples_at_once + row) * columns_at_once + column % columns_at_once];
        }
    });
}
