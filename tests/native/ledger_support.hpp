// What the ledger's tests share: a private directory of their own, child processes, waiting with a deadline.
#pragma once

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "check.hpp"
#include "ledger/ledger.hpp"

namespace ledgertest {

using namespace elastickv;

inline constexpr std::uint64_t MiB = std::uint64_t{1} << 20;

struct Directory {
    std::string root, path;
    Directory() {
        std::error_code error;
        const std::filesystem::path base = std::filesystem::temp_directory_path(error);
        if (error)
            check::fail(__FILE__, __LINE__, "no place for temporary files: " + error.message() + "; set TMPDIR to one");
        std::string pattern = (base / "ledger-test-XXXXXX").string();
        if (mkdtemp(pattern.data()) == nullptr)
            check::fail(
                __FILE__, __LINE__,
                "no directory in " + base.string() + ": " + std::strerror(errno) + "; set TMPDIR to a place for files");
        root = pattern;
        path = root + "/ekv";
    }
    ~Directory() {
        std::error_code ignored;
        std::filesystem::remove_all(root, ignored);
    }
    Directory(const Directory &) = delete;
    Directory &operator=(const Directory &) = delete;
    std::string file(const std::string &name) const { return path + "/" + name; }
};

inline Result<std::shared_ptr<Ledger>> try_open(const Directory &directory, std::uint64_t capacity,
                                                std::uint64_t deadline_ms = 2000) {
    LedgerOptions options;
    options.directory = directory.path;
    options.device = "host";
    options.capacity = capacity;
    options.deadline_ms = deadline_ms;
    return Ledger::open(options);
}
inline std::shared_ptr<Ledger> open(const Directory &directory, std::uint64_t capacity,
                                    std::uint64_t deadline_ms = 2000) {
    auto opened = try_open(directory, capacity, deadline_ms);
    CHECK_OK(opened);
    return *opened;
}
inline TenantOptions named(const std::string &name, std::uint64_t floor = 0) {
    TenantOptions options;
    options.name = name;
    options.floor = floor;
    return options;
}
inline std::unique_ptr<Tenant> join(const std::shared_ptr<Ledger> &ledger, const TenantOptions &options) {
    auto joined = ledger->join(options);
    CHECK_OK(joined);
    return std::move(joined).value();
}
inline std::unique_ptr<Tenant> join(const std::shared_ptr<Ledger> &ledger, const std::string &name,
                                    std::uint64_t floor = 0) {
    return join(ledger, named(name, floor));
}
inline std::vector<TenantView> rows_of(const std::shared_ptr<Ledger> &ledger) {
    auto view = ledger->view();
    CHECK_OK(view);
    return view->tenants;
}
inline TenantView row_of(const std::shared_ptr<Ledger> &ledger, const std::string &name) {
    for (const TenantView &tenant : rows_of(ledger)) {
        if (tenant.name == name) return tenant;
    }
    check::fail(__FILE__, __LINE__, "no row of " + name);
}

inline std::uint64_t now_ms() {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1000 + static_cast<std::uint64_t>(now.tv_nsec) / 1000000;
}

// A forked process that runs `body` and exits with 0, or 1 if a check in it failed. Killed when it outlives the test.
class Child {
  public:
    explicit Child(const std::function<void()> &body) {
        std::fflush(stdout);
        pid_ = fork();
        if (pid_ != 0) return;
        prctl(PR_SET_PDEATHSIG, SIGKILL);  // a test that is killed leaves nobody behind
        int code = 0;
        try {
            body();
        } catch (const check::Failure &failure) {
            std::fprintf(stderr, "in a child: %s\n", failure.text.c_str());
            code = 1;
        }
        _exit(code);
    }
    ~Child() {
        if (pid_ > 0) {
            ::kill(pid_, SIGKILL);
            wait();
        }
    }
    Child(const Child &) = delete;
    Child &operator=(const Child &) = delete;
    pid_t pid() const { return pid_; }
    void kill() { ::kill(pid_, SIGKILL); }
    // Exit code, or 1000 + signal.
    int wait() {
        int status = 0;
        if (pid_ <= 0 || waitpid(pid_, &status, 0) != pid_) return -1;
        pid_ = -1;
        return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    }

  private:
    pid_t pid_ = -1;
};

// A pipe over which processes tell each other that they are so far.
class Signal {
  public:
    Signal() {
        if (pipe(ends_) != 0) check::fail(__FILE__, __LINE__, "pipe failed");
    }
    ~Signal() {
        close(ends_[0]);
        close(ends_[1]);
    }
    Signal(const Signal &) = delete;
    Signal &operator=(const Signal &) = delete;
    void send() const { CHECK_EQ(write(ends_[1], "x", 1), 1); }
    void receive() const {
        char byte = 0;
        pollfd ready{ends_[0], POLLIN, 0};
        CHECK_EQ(poll(&ready, 1, 20'000), 1);
        CHECK_EQ(read(ends_[0], &byte, 1), 1);
    }

  private:
    int ends_[2];
};

}  // namespace ledgertest
