#include "evaluator.hpp"

namespace {

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

}  // namespace

void count_draws(Index prompts, Index resamples, std::uint64_t seed, Index threads, std::int32_t *counts) {
    run_parallel(resamples, count_threads(threads, 3.0 * prompts * resamples), [=](Queue &queue) {
        for (Index resample; queue.take(resample);) {
            std::int32_t *row = counts + resample * prompts;
            std::fill(row, row + prompts, 0);
            SplitMix64 generator(seed, resample);
            for (Index draw = 0; draw < prompts; ++draw) ++row[generator.below(static_cast<std::uint32_t>(prompts))];
        }
    });
}
