/*
 * integrity: the peer of `interop integrity`, over libibverbs. The sequence of operations and its model are explained in
 * sequence.go, the conversation in integrity.go; whatever draws random numbers here does so in the order of the Go code.
 *
 *	integrity -d DEVICE -g GID_INDEX [-p PORT] [-i IB_PORT] [-m MTU] [-s SEED] [-n ROUNDS] [-e] [-l] [SERVER]
 *
 * -l puts up with atomics that complete without their result, as between two rxe (see sequence.go).
 * Exit status 0: all completions and all bytes were what they must be.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	BATCH_MAX = 8,
	PIECES = 4,
	PIECE_MAX = 16 << 10,
	LANE_SIZE = PIECES * PIECE_MAX,
	LOCAL_SIZE = BATCH_MAX * LANE_SIZE,
	PART_SIZE = 80 << 10,
	WINDOW_SIZE = PIECES * PART_SIZE,
	INLINE_MAX = 64,
	LINE_MAX = 256,
};

static void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, "integrity: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n");
	va_end(args);
	exit(1);
}

/* The sequence. */

static uint64_t next(uint64_t *random)
{
	uint64_t z = *random += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static int below(uint64_t *random, int n)
{
	return next(random) % (uint64_t)n;
}

static void fill(uint64_t *random, uint8_t *b, size_t n)
{
	while (n > 0) {
		uint64_t v = htole64(next(random));
		size_t part = n < 8 ? n : 8;

		memcpy(b, &v, part);
		b += part;
		n -= part;
	}
}

struct span {
	int off, n;
};

struct operation {
	enum ibv_wr_opcode opcode;
	bool signaled, fenced, solicited, inlined, takes_recv, behind;
	uint32_t imm;
	int total, remote;
	uint64_t compare_add, swap;
	uint8_t before[8];
	int locals, recvs;
	struct span local[PIECES], recv[PIECES];
};

struct direction {
	uint64_t random;
	int n;
	struct operation batch[BATCH_MAX];
	uint8_t local[LOCAL_SIZE];
	uint8_t window[WINDOW_SIZE];
};

static const enum ibv_wr_opcode opcodes[] = {
	IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_SEND, IBV_WR_SEND_WITH_IMM,
	IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_ATOMIC_FETCH_AND_ADD,
};

static bool is_atomic(enum ibv_wr_opcode opcode)
{
	return opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
}

static bool gets(enum ibv_wr_opcode opcode)
{
	return opcode == IBV_WR_RDMA_READ || is_atomic(opcode);
}

static void start_direction(struct direction *d, uint64_t seed, bool server)
{
	d->random = server ? seed ^ 0xd1342543de82ef95 : seed;
	fill(&d->random, d->local, LOCAL_SIZE);
	fill(&d->random, d->window, WINDOW_SIZE);
}

static void next_atomic(struct direction *d, struct operation *o, int lane)
{
	uint64_t old;
	uint8_t *cell;

	o->locals = 1;
	o->local[0].off = lane * LANE_SIZE + 8 * below(&d->random, PIECE_MAX / 8);
	o->local[0].n = o->total = 8;
	o->remote = 8 * below(&d->random, WINDOW_SIZE / 8);
	cell = d->window + o->remote;
	memcpy(&old, cell, 8);
	memcpy(o->before, d->local + o->local[0].off, 8);
	memcpy(d->local + o->local[0].off, &old, 8);
	if (o->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
		uint64_t sum;

		o->compare_add = next(&d->random);
		sum = old + o->compare_add;
		memcpy(cell, &sum, 8);
		return;
	}
	bool matches = below(&d->random, 2) == 0;

	o->compare_add = next(&d->random);
	o->swap = next(&d->random);
	if (matches)
		o->compare_add = old;
	if (o->compare_add == old)
		memcpy(cell, &o->swap, 8);
}

static void next_transfer(struct direction *d, struct operation *o, int lane, bool may_inline)
{
	static const int sizes[] = { 64, 1 << 10, 4 << 10, PIECE_MAX };
	static uint8_t message[LANE_SIZE];
	int i, at = 0, k = below(&d->random, 4 * PIECES + 1);

	o->locals = k > 0 ? 1 + (k - 1) % PIECES : 0;
	for (i = 0; i < o->locals; i++) {
		int n = 1 + below(&d->random, sizes[below(&d->random, 4)]);

		o->local[i].off = lane * LANE_SIZE + i * PIECE_MAX + below(&d->random, PIECE_MAX - n + 1);
		o->local[i].n = n;
		o->total += n;
	}
	if (o->opcode == IBV_WR_RDMA_READ || o->opcode == IBV_WR_RDMA_WRITE || o->opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
		o->remote = below(&d->random, WINDOW_SIZE - o->total + 1);
	if (o->opcode == IBV_WR_RDMA_READ) {
		for (i = 0; i < o->locals; i++) {
			memcpy(d->local + o->local[i].off, d->window + o->remote + at, o->local[i].n);
			at += o->local[i].n;
		}
		return;
	}
	for (i = 0; i < o->locals; i++) {
		fill(&d->random, d->local + o->local[i].off, o->local[i].n);
		memcpy(message + at, d->local + o->local[i].off, o->local[i].n);
		at += o->local[i].n;
	}
	o->inlined = may_inline && o->total > 0 && o->total <= INLINE_MAX;
	if (o->opcode == IBV_WR_RDMA_WRITE_WITH_IMM) {
		o->takes_recv = true;
		if (below(&d->random, 2) == 0) {
			o->recvs = 1;
			o->recv[0].off = below(&d->random, PART_SIZE - 64 + 1);
			o->recv[0].n = 64;
		}
	}
	if (o->opcode == IBV_WR_RDMA_WRITE_WITH_IMM || o->opcode == IBV_WR_RDMA_WRITE) {
		memcpy(d->window + o->remote, message, o->total);
		return;
	}
	o->takes_recv = true;
	int room = o->total;

	if (below(&d->random, 3) == 0)
		room += below(&d->random, 1024);
	int n = 1 + below(&d->random, PIECES);
	int part = below(&d->random, PIECES);

	for (at = k = 0; k < n && room > 0; k++) {
		int length = k < n - 1 ? 1 + below(&d->random, room) : room;
		int used = o->total - at < length ? o->total - at : length;
		struct span *s = &o->recv[o->recvs++];

		room -= length;
		s->off = (part + k) % PIECES * PART_SIZE + below(&d->random, PART_SIZE - length + 1);
		s->n = length;
		memcpy(d->window + s->off, message + at, used);
		at += used;
	}
}

static void next_batch(struct direction *d)
{
	bool after_read = false, fenced = false, answered = true;

	d->n = below(&d->random, BATCH_MAX + 1);
	memset(d->batch, 0, sizeof d->batch);
	for (int i = 0; i < d->n; i++) {
		struct operation *o = &d->batch[i];

		o->opcode = opcodes[below(&d->random, sizeof opcodes / sizeof *opcodes)];
		uint64_t bits = next(&d->random);

		o->imm = next(&d->random);
		o->signaled = bits & 1 || i == d->n - 1;
		if ((fenced && gets(o->opcode)) || (after_read && is_atomic(o->opcode)))
			o->opcode = IBV_WR_RDMA_WRITE;
		if (!gets(o->opcode) && ((bits >> 1 & 7) == 0 || after_read)) {
			o->fenced = fenced = true;
			after_read = false;
		}
		after_read = after_read || o->opcode == IBV_WR_RDMA_READ;
		o->solicited = bits >> 4 & 1;
		o->behind = !answered;
		answered = answered && gets(o->opcode);
		if (is_atomic(o->opcode))
			next_atomic(d, o, i);
		else
			next_transfer(d, o, i, bits >> 5 & 1);
	}
}

/* TCP. */

static int conn;

static void put(const char *line)
{
	if (write(conn, line, strlen(line)) != (ssize_t)strlen(line))
		die("the peer has gone");
}

static void get(char *line, int max)
{
	for (int n = 0; n < max - 1; n++) {
		if (read(conn, line + n, 1) != 1)
			die("the peer has ended early");
		if (line[n] == '\n') {
			line[n + 1] = 0;
			return;
		}
	}
	die("the peer's line is too long");
}

static int try_connect(const char *server, const char *port)
{
	struct addrinfo hints = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM }, *all, *a;
	int fd = -1;

	if (getaddrinfo(server, port, &hints, &all))
		die("no such host: %s", server);
	for (a = all; a; a = a->ai_next) {
		fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
		if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0)
			break;
		if (fd >= 0)
			close(fd);
		fd = -1;
	}
	freeaddrinfo(all);
	return fd;
}

static void open_conn(const char *server, const char *port)
{
	if (server) {
		for (int tries = 0; (conn = try_connect(server, port)) < 0; tries++) {
			if (tries == 1000)
				die("cannot connect to %s, port %s", server, port);
			usleep(10000);
		}
		return;
	}
	int one = 1, l = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in any = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };

	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (l < 0 || bind(l, (struct sockaddr *)&any, sizeof any) || listen(l, 1))
		die("cannot listen on port %s: %s", port, strerror(errno));
	conn = accept(l, NULL, NULL);
	close(l);
	if (conn < 0)
		die("accept: %s", strerror(errno));
}

/* RDMA. */

static struct direction in, out; /* the peer's operations here, and the own ones there */
static _Alignas(4096) uint8_t local[LOCAL_SIZE], window[WINDOW_SIZE];
static struct ibv_mr *local_mr, *window_mr;
static struct ibv_comp_channel *channel;
static struct ibv_cq *cq;
static struct ibv_qp *qp;
static uint64_t remote_addr;
static uint32_t remote_rkey;
static bool server_side;

static void meet_up(char point)
{
	struct direction *a = server_side ? &in : &out, *b = server_side ? &out : &in;
	char mine[LINE_MAX], theirs[LINE_MAX];

	snprintf(mine, sizeof mine, "%c%016" PRIx64 "%016" PRIx64 "\n", point, a->random, b->random);
	put(mine);
	get(theirs, sizeof theirs);
	if (strcmp(mine, theirs))
		die("the peer computes something else: it is at %.33s, and this side at %.33s", theirs, mine);
}

static int scatter(struct ibv_sge *sges, const struct span *spans, int n, uint8_t *base, struct ibv_mr *mr)
{
	for (int i = 0; i < n; i++)
		sges[i] = (struct ibv_sge){ (uintptr_t)(base + spans[i].off), spans[i].n, mr->lkey };
	return n;
}

static uint64_t id(int round, int n, bool recv)
{
	return (uint64_t)recv << 63 | (uint64_t)round << 8 | n;
}

static void post_receives(int round)
{
	struct ibv_recv_wr wrs[BATCH_MAX], *bad;
	struct ibv_sge sges[BATCH_MAX][PIECES];
	int n = 0;

	for (int i = 0; i < in.n; i++) {
		struct operation *o = &in.batch[i];

		if (!o->takes_recv)
			continue;
		wrs[n] = (struct ibv_recv_wr){ .wr_id = id(round, n, true), .sg_list = sges[n] };
		wrs[n].num_sge = scatter(sges[n], o->recv, o->recvs, window, window_mr);
		if (n > 0)
			wrs[n - 1].next = &wrs[n];
		n++;
	}
	if (n > 0 && ibv_post_recv(qp, wrs, &bad))
		die("round %d: ibv_post_recv: %s", round, strerror(errno));
}

static void post_batch(int round)
{
	struct ibv_send_wr wrs[BATCH_MAX], *bad;
	struct ibv_sge sges[BATCH_MAX][PIECES];
	int err;

	for (int i = 0; i < out.n; i++) {
		struct operation *o = &out.batch[i];
		struct ibv_send_wr *wr = &wrs[i];

		*wr = (struct ibv_send_wr){ .wr_id = id(round, i, false), .opcode = o->opcode, .sg_list = sges[i] };
		wr->imm_data = htobe32(o->imm);
		wr->num_sge = scatter(sges[i], o->local, o->locals, local, local_mr);
		wr->send_flags = (o->signaled ? IBV_SEND_SIGNALED : 0) | (o->fenced ? IBV_SEND_FENCE : 0) |
				 (o->solicited ? IBV_SEND_SOLICITED : 0) | (o->inlined ? IBV_SEND_INLINE : 0);
		switch (o->opcode) {
		case IBV_WR_ATOMIC_CMP_AND_SWP:
		case IBV_WR_ATOMIC_FETCH_AND_ADD:
			wr->wr.atomic.remote_addr = remote_addr + o->remote;
			wr->wr.atomic.rkey = remote_rkey;
			wr->wr.atomic.compare_add = o->compare_add;
			wr->wr.atomic.swap = o->swap;
			break;
		case IBV_WR_RDMA_READ:
			wr->wr.rdma.remote_addr = remote_addr + o->remote;
			wr->wr.rdma.rkey = remote_rkey;
			break;
		default:
			if (!o->takes_recv || o->opcode == IBV_WR_RDMA_WRITE_WITH_IMM) {
				wr->wr.rdma.remote_addr = remote_addr + o->remote;
				wr->wr.rdma.rkey = remote_rkey;
			}
			for (int k = 0; k < o->locals; k++)
				memcpy(local + o->local[k].off, out.local + o->local[k].off, o->local[k].n);
		}
		if (i > 0)
			wrs[i - 1].next = wr;
	}
	if (out.n > 0 && (err = ibv_post_send(qp, wrs, &bad)))
		die("round %d: ibv_post_send: %s", round, strerror(err));
}

static void next_completion(struct ibv_wc *wc)
{
	struct ibv_cq *of;
	void *context;
	int n;

	while ((n = ibv_poll_cq(cq, 1, wc)) == 0) {
		if (!channel) {
			sched_yield();
			continue;
		}
		if (ibv_req_notify_cq(cq, 0))
			die("ibv_req_notify_cq failed");
		if ((n = ibv_poll_cq(cq, 1, wc)) != 0)
			break;
		if (ibv_get_cq_event(channel, &of, &context))
			die("ibv_get_cq_event: %s", strerror(errno));
		ibv_ack_cq_events(cq, 1);
	}
	if (n < 0)
		die("ibv_poll_cq failed");
}

static void check_recv(const struct ibv_wc *wc, const struct operation *o, int round)
{
	bool writes = o->opcode == IBV_WR_RDMA_WRITE_WITH_IMM;

	if (wc->opcode != (writes ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV) || wc->byte_len != (uint32_t)o->total)
		die("round %d: receive %#" PRIx64 " completed with opcode %d and %u bytes instead of %d", round, wc->wr_id, wc->opcode,
		    wc->byte_len, o->total);
	if (o->opcode == IBV_WR_SEND ? wc->wc_flags & IBV_WC_WITH_IMM
				     : !(wc->wc_flags & IBV_WC_WITH_IMM) || be32toh(wc->imm_data) != o->imm)
		die("round %d: receive %#" PRIx64 " completed with flags %#x and immediate %#x instead of %#x", round, wc->wr_id,
		    wc->wc_flags, be32toh(wc->imm_data), o->imm);
}

/* next_that returns the next operation from *i on that has a completion of a kind. */
static const struct operation *next_that(const struct direction *d, int *i, bool recv)
{
	for (; *i < d->n; ++*i)
		if (recv ? d->batch[*i].takes_recv : d->batch[*i].signaled)
			return &d->batch[(*i)++];
	return NULL;
}

static void complete(int round)
{
	int sends = 0, recvs = 0, got_recvs = 0, left = 0;

	for (int i = 0; i < out.n; i++)
		left += out.batch[i].signaled;
	for (int i = 0; i < in.n; i++)
		left += in.batch[i].takes_recv;
	for (; left > 0; left--) {
		const struct operation *o;
		struct ibv_wc wc;
		bool recv;

		next_completion(&wc);
		if (wc.status != IBV_WC_SUCCESS)
			die("round %d: request %#" PRIx64 " failed: %s (vendor %#x)", round, wc.wr_id, ibv_wc_status_str(wc.status),
			    wc.vendor_err);
		recv = wc.wr_id >> 63;
		o = recv ? next_that(&in, &recvs, true) : next_that(&out, &sends, false);
		if (!o || wc.wr_id != id(round, recv ? got_recvs++ : sends - 1, recv) || wc.qp_num != qp->qp_num)
			die("round %d: an unexpected completion of request %#" PRIx64 " on QP %#x", round, wc.wr_id, wc.qp_num);
		if (recv)
			check_recv(&wc, o, round);
	}
}

static void compare(const char *what, int round, const uint8_t *got, const uint8_t *want, int n)
{
	int first = -1, wrong = 0;

	if (!memcmp(got, want, n))
		return;
	for (int i = 0; i < n; i++)
		if (got[i] != want[i]) {
			if (first < 0)
				first = i;
			wrong++;
		}
	die("round %d: %s: %d of %d bytes are wrong, the first at %d: %#x instead of %#x", round, what, wrong, n, first, got[first],
	    want[first]);
}

/* find_lost puts the results of the batch's atomics into local memory that have been lost, and returns how many those were. */
static int find_lost(void)
{
	int n = 0;

	for (int i = 0; i < out.n; i++) {
		struct operation *o = &out.batch[i];
		uint8_t *got = local + o->local[0].off, *want = out.local + o->local[0].off;

		if (!is_atomic(o->opcode) || !o->behind || !memcmp(got, want, 8) || memcmp(got, o->before, 8))
			continue;
		memcpy(got, want, 8);
		n++;
	}
	return n;
}

static struct ibv_context *open_device(const char *name)
{
	struct ibv_device **list = ibv_get_device_list(NULL);

	for (int i = 0; list && list[i]; i++)
		if (!name || !strcmp(ibv_get_device_name(list[i]), name)) {
			struct ibv_context *c = ibv_open_device(list[i]);

			if (!c)
				die("cannot open %s", ibv_get_device_name(list[i]));
			ibv_free_device_list(list);
			return c;
		}
	die("no device %s", name ? name : "at all");
	return NULL;
}

static enum ibv_mtu mtu_code(int mtu)
{
	for (int code = IBV_MTU_256; code <= IBV_MTU_4096; code++)
		if (128 << code == mtu)
			return code;
	die("an MTU of %d bytes", mtu);
	return 0;
}

static void connect_qp(int ib_port, int gid_index, int mtu, const union ibv_gid *gid, uint32_t qpn, uint32_t psn,
		       uint32_t my_psn)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = mtu_code(mtu),
		.dest_qp_num = qpn,
		.rq_psn = psn,
		.max_dest_rd_atomic = 4,
		.min_rnr_timer = 12,
		.ah_attr = { .is_global = 1, .port_num = ib_port,
			     .grh = { .dgid = *gid, .sgid_index = gid_index, .hop_limit = 64 } },
	};

	if (ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				     IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER))
		die("cannot modify the queue pair to RTR: %s", strerror(errno));
	attr.qp_state = IBV_QPS_RTS;
	attr.timeout = 14;
	attr.retry_cnt = 7;
	attr.rnr_retry = 7;
	attr.sq_psn = my_psn;
	attr.max_rd_atomic = 4;
	if (ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
				     IBV_QP_MAX_QP_RD_ATOMIC))
		die("cannot modify the queue pair to RTS: %s", strerror(errno));
}

static void print_gid(char *hex, const union ibv_gid *gid)
{
	for (int i = 0; i < 16; i++)
		sprintf(hex + 2 * i, "%02x", gid->raw[i]);
}

static void parse_gid(union ibv_gid *gid, const char *hex)
{
	for (int i = 0; i < 16; i++)
		if (sscanf(hex + 2 * i, "%2hhx", &gid->raw[i]) != 1)
			die("not a GID: %s", hex);
}

int main(int argc, char **argv)
{
	const char *device = NULL, *port = "18516", *server = NULL;
	int c, ib_port = 1, gid_index = 0, mtu = 1024, rounds = 200, ops = 0, lost = 0;
	uint64_t seed = 1;
	bool events = false, lost_results = false;

	while ((c = getopt(argc, argv, "d:g:p:i:m:s:n:el")) != -1)
		switch (c) {
		case 'd': device = optarg; break;
		case 'g': gid_index = atoi(optarg); break;
		case 'p': port = optarg; break;
		case 'i': ib_port = atoi(optarg); break;
		case 'm': mtu = atoi(optarg); break;
		case 's': seed = strtoull(optarg, NULL, 0); break;
		case 'n': rounds = atoi(optarg); break;
		case 'e': events = true; break;
		case 'l': lost_results = true; break;
		default: die("see the beginning of integrity.c for the options");
		}
	server = argv[optind];
	server_side = !server;
	alarm(600); /* whatever happens, do not stay for ever */

	struct ibv_context *dev = open_device(device);
	struct ibv_pd *pd = ibv_alloc_pd(dev);

	if (!pd)
		die("ibv_alloc_pd failed");
	local_mr = ibv_reg_mr(pd, local, LOCAL_SIZE, IBV_ACCESS_LOCAL_WRITE);
	window_mr = ibv_reg_mr(pd, window, WINDOW_SIZE,
			       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC);
	if (!local_mr || !window_mr)
		die("ibv_reg_mr: %s", strerror(errno));
	if (events && !(channel = ibv_create_comp_channel(dev)))
		die("ibv_create_comp_channel failed");
	if (!(cq = ibv_create_cq(dev, 4 * BATCH_MAX, NULL, channel, 0)))
		die("ibv_create_cq failed");
	struct ibv_qp_init_attr init = {
		.send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC,
		.cap = { 2 * BATCH_MAX, 2 * BATCH_MAX, PIECES, PIECES, INLINE_MAX },
	};
	if (!(qp = ibv_create_qp(pd, &init)))
		die("ibv_create_qp failed");
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_INIT, .port_num = ib_port,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };

	if (ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS))
		die("cannot modify the queue pair to INIT");

	union ibv_gid gid, their_gid;
	uint32_t qpn, psn, my_psn = (time(NULL) ^ getpid()) * 2654435761u & 0xffffff;
	char line[LINE_MAX], hex[33], their_hex[33];
	uint64_t their_seed;
	int their_rounds, their_mtu;

	if (ibv_query_gid(dev, ib_port, gid_index, &gid))
		die("no GID in slot %d", gid_index);
	print_gid(hex, &gid);
	open_conn(server, port);

#define HELLO "ringside-integrity 1 seed=%016" PRIx64 " rounds=%d mtu=%d qpn=%06x psn=%06x gid=%s addr=%016" PRIx64 \
	      " rkey=%08x\n"
#define INTRODUCE() do { \
		snprintf(line, sizeof line, HELLO, seed, rounds, mtu, qp->qp_num, my_psn, hex, \
			 (uint64_t)(uintptr_t)window, window_mr->rkey); \
		put(line); \
	} while (0)

	if (server)
		INTRODUCE();
	get(line, sizeof line);
	if (sscanf(line, "ringside-integrity 1 seed=%" SCNx64 " rounds=%d mtu=%d qpn=%x psn=%x gid=%32s addr=%" SCNx64 " rkey=%x",
		   &their_seed, &their_rounds, &their_mtu, &qpn, &psn, their_hex, &remote_addr, &remote_rkey) != 8)
		die("not an introduction: %s", line);
	if (server && (their_seed != seed || their_rounds != rounds || their_mtu != mtu))
		die("the server answered with other parameters: %s", line);
	seed = their_seed;
	rounds = their_rounds;
	mtu = their_mtu;
	parse_gid(&their_gid, their_hex);
	connect_qp(ib_port, gid_index, mtu, &their_gid, qpn, psn, my_psn);
	start_direction(&out, seed, server_side);
	start_direction(&in, seed, !server_side);
	memcpy(local, out.local, LOCAL_SIZE);
	memcpy(window, in.window, WINDOW_SIZE);
	if (server_side)
		INTRODUCE();

	for (int round = 0; round < rounds; round++) {
		next_batch(&out);
		next_batch(&in);
		ops += out.n + in.n;
		post_receives(round);
		meet_up('P');
		post_batch(round);
		complete(round);
		meet_up('D');
		if (lost_results)
			lost += find_lost();
		compare("memory that this side sends from and reads into", round, local, out.local, LOCAL_SIZE);
		compare("memory that the peer works on", round, window, in.window, WINDOW_SIZE);
	}
	printf("seed %#" PRIx64 ": %d rounds with %d operations: all memory as it must be", seed, rounds, ops);
	if (lost > 0)
		printf(", but for the results of %d atomics", lost);
	printf("\n");
	if (ibv_destroy_qp(qp) || ibv_destroy_cq(cq) || (channel && ibv_destroy_comp_channel(channel)) || ibv_dereg_mr(local_mr) ||
	    ibv_dereg_mr(window_mr) || ibv_dealloc_pd(pd) || ibv_close_device(dev))
		die("something could not be destroyed");
	return 0;
}
