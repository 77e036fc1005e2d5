// Threads for loops whose items can be worked on in any order.

#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

using Index = std::int64_t;

// IEEE arithmetic in this thread: torch.set_flush_denormal(True), say, makes denormals zero, and so equal.
class IeeeArithmetic {
    std::fenv_t before;

public:
    IeeeArithmetic() {
        std::fegetenv(&before);
        std::fesetenv(FE_DFL_ENV);
    }
    ~IeeeArithmetic() { std::fesetenv(&before); }
    IeeeArithmetic(const IeeeArithmetic &) = delete;
};

// Hands out 0 .. items - 1, each once.
class Queue {
    std::atomic<Index> next{0};
    const Index items;

public:
    explicit Queue(Index items) : items(items) {}
    bool take(Index &item) { return (item = next.fetch_add(1, std::memory_order_relaxed)) < items; }
    void drop_the_rest() { next = items; }
};

// `requested`, or where that is 0 as many as the machine has and as pay, two from 0.2 milliseconds of work on: each that is
// started costs this one some 15 microseconds, and begins late on shared cores.
inline Index count_threads(Index requested, double nanoseconds) {
    if (requested > 0) return requested;
    static const Index machine = std::max(1u, std::thread::hardware_concurrency());  // asking takes 10 microseconds
    return std::clamp<Index>(static_cast<Index>(std::min(std::sqrt(nanoseconds / 5e4), 1e6)), 1, machine);
}

// What the threads of one run share. It outlives the run: a thread that the system starts only when all is done finds it closed.
struct Crew {
    std::mutex mutex;
    std::condition_variable none_at_work;
    Index at_work = 0;
    bool closed = false;
    std::exception_ptr error;
};

// Runs work(queue) on each of up to `threads` threads, this one among them; the first exception of any is thrown here. Threads
// that have not started by the end are not waited for: on shared cores that can take longer than the work.
template <class Work> void run_parallel(Index items, Index threads, const Work &work) {
    Queue queue(items);
    const auto crew = std::make_shared<Crew>();
    const auto guarded = [](Queue &queue, const Work &work, Crew &crew) {
        try {
            const IeeeArithmetic arithmetic;
            work(queue);
        } catch (...) {
            queue.drop_the_rest();
            const std::lock_guard<std::mutex> lock(crew.mutex);
            if (!crew.error) crew.error = std::current_exception();
        }
    };
    const auto join = [crew, guarded, &queue, &work] {
        {
            const std::lock_guard<std::mutex> lock(crew->mutex);
            if (crew->closed) return;
            ++crew->at_work;
        }
        guarded(queue, work, *crew);
        const std::lock_guard<std::mutex> lock(crew->mutex);
        if (--crew->at_work == 0) crew->none_at_work.notify_all();
    };
    try {
        for (Index other = 1; other < std::min(threads, items); ++other) std::thread(join).detach();
    } catch (...) {  // the system has no more; those that run do all of it
    }
    guarded(queue, work, *crew);
    std::unique_lock<std::mutex> lock(crew->mutex);
    crew->closed = true;
    crew->none_at_work.wait(lock, [&] { return crew->at_work == 0; });
    if (crew->error) std::rethrow_exception(crew->error);
}
