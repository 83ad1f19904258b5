// The driver calls that one extent costs, by themselves: create, map, give access, clear, wait; then unmap, release.
// mapper_cost.py builds and runs it:  raw_calls EXTENT_BYTES EXTENTS  -> for each line on stdin one round, answered by a
// line of JSON in microseconds an extent.
#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

struct Properties {
    int type, handle_types;
    struct {
        int type, id;
    } location;
    void *metadata;
    unsigned char flags[8];
};
struct Access {
    struct {
        int type, id;
    } location;
    int flags;
};

void *library = nullptr;

template <class... Arguments> auto find(const char *name) {
    auto found = reinterpret_cast<int (*)(Arguments...)>(::dlsym(library, name));
    if (found == nullptr) std::exit((std::fprintf(stderr, "no %s\n", name), 1));
    return found;
}

void check(int code, const char *what) {
    if (code != 0) std::exit((std::fprintf(stderr, "%s: error %d\n", what, code), 1));
}

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
    return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const std::size_t bytes = std::strtoull(argv[1], nullptr, 10), count = std::strtoull(argv[2], nullptr, 10);
    library = ::dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) return 1;
    check(find<unsigned>("cuInit")(0), "cuInit");
    void *context = nullptr, *stream = nullptr;
    check(find<void **, int>("cuDevicePrimaryCtxRetain")(&context, 0), "cuDevicePrimaryCtxRetain");
    check(find<void *>("cuCtxSetCurrent")(context), "cuCtxSetCurrent");
    check(find<void **, unsigned>("cuStreamCreate")(&stream, 1), "cuStreamCreate");
    const auto reserve = find<std::uint64_t *, std::size_t, std::size_t, std::uint64_t, unsigned long long>(
        "cuMemAddressReserve");
    const auto create = find<std::uint64_t *, std::size_t, const Properties *, unsigned long long>("cuMemCreate");
    const auto map = find<std::uint64_t, std::size_t, std::size_t, std::uint64_t, unsigned long long>("cuMemMap");
    const auto give = find<std::uint64_t, std::size_t, const Access *, std::size_t>("cuMemSetAccess");
    const auto clear = find<std::uint64_t, unsigned char, std::size_t, void *>("cuMemsetD8Async");
    const auto make_event = find<void **, unsigned>("cuEventCreate");
    const auto record = find<void *, void *>("cuEventRecord");
    const auto query = find<void *>("cuEventQuery");
    const auto drop_event = find<void *>("cuEventDestroy_v2");
    const auto unmap = find<std::uint64_t, std::size_t>("cuMemUnmap");
    const auto release = find<std::uint64_t>("cuMemRelease");
    std::uint64_t base = 0;
    check(reserve(&base, bytes * count, 0, 0, 0), "cuMemAddressReserve");
    Properties properties{};
    properties.type = 1;
    properties.location = {1, 0};
    const Access access{{1, 0}, 3};
    std::vector<std::uint64_t> handles(count);
    for (char line[16]; std::fgets(line, sizeof line, stdin) != nullptr;) {
        double clearing = 0;
        const auto up = Clock::now();
        for (std::size_t i = 0; i < count; ++i) {
            const std::uint64_t at = base + i * bytes;
            check(create(&handles[i], bytes, &properties, 0), "cuMemCreate");
            check(map(at, bytes, 0, handles[i], 0), "cuMemMap");
            check(give(at, bytes, &access, 1), "cuMemSetAccess");
            const auto start = Clock::now();
            void *event = nullptr;
            check(clear(at, 0, bytes, stream), "cuMemsetD8Async");
            check(make_event(&event, 2), "cuEventCreate");
            check(record(event, stream), "cuEventRecord");
            while (query(event) != 0) {
            }
            check(drop_event(event), "cuEventDestroy");
            clearing += since(start);
        }
        const double mapped = since(up);
        const auto down = Clock::now();
        for (std::size_t i = 0; i < count; ++i) {
            check(unmap(base + i * bytes, bytes), "cuMemUnmap");
            check(release(handles[i]), "cuMemRelease");
        }
        const double n = static_cast<double>(count);
        std::printf("{\"map\": %.3f, \"clear\": %.3f, \"unmap\": %.3f}\n", mapped / n, clearing / n, since(down) / n);
        std::fflush(stdout);
    }
    return 0;
}
