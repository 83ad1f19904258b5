// Ranks in processes of their own, over the stand-in; one of them is killed in the middle of a mapping or an unmapping.
#include <signal.h>

#include "base/faultpoint.hpp"
#include "stack_fixture.hpp"

namespace {

using namespace stacktest;

struct Place {
    std::string directory, table;
    int slot;
    std::uint64_t incarnation;
    Form form;
};

// What a worker process does: attach, and fence what is ordered as it comes, until it is killed.
void serve(const Place &place, std::uint32_t rank, const char *dies_at) {
    const Engine engine(1);
    LedgerOptions where;
    where.directory = place.directory;
    where.device = "host";
    auto ledger = Ledger::open(where);
    CHECK_OK(ledger);
    auto member = (*ledger)->attach(place.slot, place.incarnation);
    CHECK_OK(member);
    const std::shared_ptr<Tenant> own = std::move(member).value();
    auto table = PageTable::open(place.table, place.incarnation);
    CHECK_OK(table);
    CudaOptions options;
    options.library = contract::standin_path();
    auto driver = make_cuda_driver(options);
    CHECK_OK(driver);
    RankHooks hooks{[own](std::int64_t bytes) { own->add_mapped(bytes); },
                    [own](std::uint64_t bytes) { own->give(bytes); }};
    auto attached = Rank::attach(*driver, *table, {rank, place.form.spans, place.form.span_bytes(), kPage}, hooks);
    CHECK_OK(attached);
    CHECK_OK((*attached)->wait_first_page(20'000));
    if (dies_at != nullptr) CHECK(fault::set(dies_at, fault::Action::kill, 1) == fault::Setting::done);
    std::uint64_t fenced = 0;
    for (int i = 0; i < 60'000; ++i) {
        const std::uint64_t ticket = (*table)->header().ticket.load();
        if (ticket > fenced) CHECK_OK((*attached)->fence(ticket, 0));
        fenced = ticket;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void dies(const char *at) {
    ledgertest::Directory directory;
    auto ledger = ledgertest::open(directory, kDevice);
    std::shared_ptr<Tenant> tenant = ledgertest::join(ledger, "stack");
    Form form;
    form.map_deadline_us = 200'000;
    auto made = PageTable::create(form.span_bytes() / kPage, form.ranks, tenant->incarnation());
    CHECK_OK(made);
    PoolOptions options;
    options.num_blocks = form.blocks;
    options.block_bytes = form.block_bytes;
    options.page_bytes = kPage;
    options.stock_pages = 0;
    options.idle_release_us = 0;
    options.map_deadline_us = form.map_deadline_us;
    auto pool = Pool::make(*made, {{tenant, form.page_cost()}}, options);
    CHECK_OK(pool);
    const Place place{directory.path, (*made)->path(), tenant->slot(), tenant->incarnation(), form};
    ledgertest::Child doomed([&] { serve(place, 0, at); });
    ledgertest::Child other([&] { serve(place, 1, nullptr); });
    CHECK_OK((*pool)->wait_ready(20'000));
    // Grow and give back until the one is dead: none of that may hang, throw or take what is not there.
    int status = 0;
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    for (int i = 0; waitpid(doomed.pid(), &status, WNOHANG) == 0 && std::chrono::steady_clock::now() < until; ++i) {
        std::vector<std::uint32_t> ids(6);
        std::uint32_t evicted = 0;
        if ((*pool)->alloc(ids, &evicted)) CHECK_OK((*pool)->release(ids, false));
        (*pool)->maintain(true);
        // Every second time what goes is left alone for a while: wanted again at once, it would only be taken back.
        for (int look = 0; i % 2 == 1 && look < 100 && (*pool)->stats().pages.transit != 0; ++look) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            (*pool)->poll();
        }
    }
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    CHECK_OK((*pool)->check_integrity());
    std::vector<std::uint32_t> ids(30);
    std::uint32_t evicted = 0;
    CHECK(!(*pool)->alloc(ids, &evicted));  // the dead one can map nothing: none now
    CHECK_OK((*pool)->check_integrity());
    CHECK(ledgertest::row_of(ledger, "stack").alive);  // the others of the tenant live
    // The engine ends with its worker: everything comes back, and the next one finds nobody in its way.
    (*pool)->close();
    pool->reset();
    made->reset();
    tenant.reset();
    other.kill();
    other.wait();
    auto next = ledgertest::join(ledger, "stack");
    CHECK_OK(next->lease(kDevice, false));
}

}  // namespace

TEST("stack: a rank that is killed in the middle of a mapping") { dies("memory.map.created"); }
TEST("stack: a rank that is killed between mapping and answer") { dies("memory.map.mapped"); }
TEST("stack: a rank that is killed in the middle of an unmapping") { dies("memory.unmap.unmapped"); }
TEST("stack: a rank that is killed between unmapping and lease") { dies("memory.unmap.answered"); }
TEST("stack: a rank that is killed while it keeps what was to go") { dies("memory.recall.begin"); }
