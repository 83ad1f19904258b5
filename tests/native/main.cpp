// Runs every registered case, or those whose name contains an argument; `--list` names them. Exit code 1 on failure.
#include "check.hpp"

#include <cstring>

int main(int argc, char **argv) {
    int failed = 0, ran = 0;
    for (auto &test : check::cases()) {
        bool wanted = argc < 2;
        for (int i = 1; i < argc; ++i) wanted = wanted || test.name.find(argv[i]) != std::string::npos;
        if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
            std::printf("%s\n", test.name.c_str());
            continue;
        }
        if (!wanted) continue;
        ++ran;
        try {
            test.body();
            std::printf("ok    %s\n", test.name.c_str());
        } catch (const check::Failure &failure) {
            ++failed;
            std::printf("FAIL  %s\n      %s\n", test.name.c_str(), failure.text.c_str());
        }
        std::fflush(stdout);
    }
    std::printf("%d ran, %d failed\n", ran, failed);
    return failed ? 1 : 0;
}
