#include "p2p/descriptor_exchange.hpp"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "error.hpp"

namespace sidp {
namespace {

constexpr std::uint64_t kHello = 0x4f4c4c4548504453ull;   // "SDPHELLO" in memory
constexpr std::uint64_t kAnswer = 0x5257534e41504453ull;  // "SDPANSWR"
constexpr int kPollMs = 50;

// Both directions say who speaks; only an answer carries a descriptor.
struct Message {
  std::uint64_t kind;
  JobToken token;
  std::int32_t rank;
  std::int32_t world_size;
};
static_assert(sizeof(Message) == 32, "the record is shared between processes");

Descriptor open_socket() {
  Descriptor socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  SIDP_REQUIRE(socket.valid(), Error, "no unix socket: ", std::strerror(errno));
  return socket;
}

bool of_this_user(int socket) {
  ucred peer{};
  socklen_t size = sizeof(peer);
  return ::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && peer.uid == ::geteuid();
}

bool send_message(int socket, const Message& message, int fd) {
  iovec part{const_cast<Message*>(&message), sizeof(message)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  if (fd >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof(control);
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &fd, sizeof(fd));
  }
  ssize_t sent;
  do {
    sent = ::sendmsg(socket, &header, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent == static_cast<ssize_t>(sizeof(message));
}

// False where nothing whole came; `fd` owns what came with it, be the message good or not.
bool receive_message(int socket, Message& message, Descriptor& fd) {
  iovec part{&message, sizeof(message)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  ssize_t got;
  do {
    got = ::recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == EINTR);
  if (got >= 0) {
    for (cmsghdr* rights = CMSG_FIRSTHDR(&header); rights != nullptr; rights = CMSG_NXTHDR(&header, rights)) {
      if (rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS) continue;
      int received = -1;
      std::memcpy(&received, CMSG_DATA(rights), sizeof(received));
      fd = Descriptor(received);
    }
  }
  return got == static_cast<ssize_t>(sizeof(message)) && (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
}

std::string listing(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return text;
}

}  // namespace

DescriptorExchange::DescriptorExchange(int rank, int world_size, JobToken token)
    : rank_(rank), world_size_(world_size), token_(token), listener_(open_socket()) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  // Without a name the kernel picks a free abstract one, which is gone with the socket.
  SIDP_REQUIRE(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&name), sizeof(name.sun_family)) == 0, Error,
               "a unix socket gets no abstract address: ", std::strerror(errno));
  SIDP_REQUIRE(::listen(listener_.get(), 4 * world_size) == 0, Error, "a unix socket does not listen: ", std::strerror(errno));
  socklen_t size = sizeof(name);
  SIDP_REQUIRE(::getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&name), &size) == 0, Error,
               "a unix socket does not tell its address: ", std::strerror(errno));
  address_.assign(name.sun_path, size - offsetof(sockaddr_un, sun_path));
  SIDP_ASSERT(!address_.empty() && address_.size() <= kMostAddressBytes, "an address of ", address_.size(), " bytes");
}

// Connecting needs no accept by the other side, so that all ranks may do it at once.
std::vector<DescriptorExchange::Call> DescriptorExchange::call_all(const std::vector<std::string>& addresses) const {
  std::vector<Call> calls;
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_) continue;
    const std::string& address = addresses.at(peer);
    SIDP_REQUIRE(!address.empty() && address.size() <= kMostAddressBytes, LayoutError, "rank ", peer, " has a socket address of ",
                 address.size(), " bytes, expected 1 ... ", kMostAddressBytes);
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::memcpy(name.sun_path, address.data(), address.size());
    Call call{open_socket(), peer};
    const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address.size());
    SIDP_REQUIRE(::connect(call.socket.get(), reinterpret_cast<sockaddr*>(&name), size) == 0, Error, "the socket of rank ", peer,
                 " cannot be reached: ", std::strerror(errno), "; ranks must share a network namespace");
    SIDP_REQUIRE(of_this_user(call.socket.get()), Error, "the socket of rank ", peer, " belongs to another user");
    SIDP_REQUIRE(send_message(call.socket.get(), {kHello, token_, rank_, world_size_}, -1), Error, "rank ", peer,
                 " does not take a message: ", std::strerror(errno));
    calls.push_back(std::move(call));
  }
  return calls;
}

void DescriptorExchange::accept_all(std::vector<Call>& callers) const {
  for (;;) {
    Descriptor socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!socket.valid()) return;  // nobody more for now
    if (of_this_user(socket.get())) callers.push_back({std::move(socket), -1});
  }
}

// The rank that was served, -1 for a stranger: it gets nothing.
int DescriptorExchange::answer(const Call& caller, int fd, const std::vector<bool>& served) const {
  Message hello{};
  Descriptor unwanted;
  if (!receive_message(caller.socket.get(), hello, unwanted)) return -1;
  const bool known = hello.kind == kHello && hello.token == token_ && hello.world_size == world_size_ && hello.rank >= 0 &&
                     hello.rank < world_size_ && hello.rank != rank_ && !served[hello.rank];
  if (!known || !send_message(caller.socket.get(), {kAnswer, token_, rank_, world_size_}, fd)) return -1;
  return hello.rank;
}

Descriptor DescriptorExchange::take_answer(const Call& call) const {
  Message message{};
  Descriptor fd;
  const bool whole = receive_message(call.socket.get(), message, fd);
  SIDP_REQUIRE(whole && fd.valid() && message.kind == kAnswer && message.token == token_ && message.rank == call.rank, Error, "rank ",
               call.rank, " answered without the descriptor that was asked for");
  return fd;
}

std::vector<Descriptor> DescriptorExchange::run(int fd, const std::vector<std::string>& addresses, double timeout_s) {
  const Deadline deadline = Deadline::after(timeout_s);
  SIDP_REQUIRE(static_cast<int>(addresses.size()) == world_size_, LayoutError, addresses.size(), " addresses for ", world_size_, " ranks");
  std::vector<Descriptor> received(world_size_);
  std::vector<bool> served(world_size_, false);
  served[rank_] = true;
  std::vector<Call> calls = call_all(addresses), callers;
  while (!calls.empty() || std::find(served.begin(), served.end(), false) != served.end()) {
    if (deadline.expired()) {
      std::vector<int> missing;
      for (int peer = 0; peer < world_size_; ++peer)
        if (peer != rank_ && (!served[peer] || !received[peer].valid())) missing.push_back(peer);
      throw Error(detail::concat("no descriptor was exchanged with rank(s) ", listing(missing), " within ", timeout_s, " s"));
    }
    accept_all(callers);
    std::vector<pollfd> waiting{{listener_.get(), POLLIN, 0}};
    for (const Call& call : calls) waiting.push_back({call.socket.get(), POLLIN, 0});
    for (const Call& call : callers) waiting.push_back({call.socket.get(), POLLIN, 0});
    if (::poll(waiting.data(), waiting.size(), kPollMs) <= 0) continue;
    for (std::size_t i = callers.size(); i-- > 0;) {
      if (waiting[1 + calls.size() + i].revents == 0) continue;
      const int peer = answer(callers[i], fd, served);
      if (peer >= 0) served[peer] = true;
      callers.erase(callers.begin() + static_cast<std::ptrdiff_t>(i));
    }
    for (std::size_t i = calls.size(); i-- > 0;) {
      if (waiting[1 + i].revents == 0) continue;
      received[calls[i].rank] = take_answer(calls[i]);
      calls.erase(calls.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  listener_.reset();
  return received;
}

}  // namespace sidp
