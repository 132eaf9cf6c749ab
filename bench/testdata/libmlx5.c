// What posting and polling cost with stock libmlx5, where completions are instant: this program writes each CQE itself, as the driver of
// this repository's benchmark does (internal/provider/mlx5, BenchmarkMeasure). Nobody looks at its doorbells.
//
//	libmlx5 write|inline|read|fetch-add|send|recv loop|post|poll|empty SIZE SGES BATCH COUNT
//
// prints the time of a request, in nanoseconds (of a poll, if empty). A batch is what one call posts. Of a batch the last request is
// signalled; where polling alone is measured all are, and one call polls them.
#include <arpa/inet.h>
#include <endian.h>
#include <infiniband/mlx5dv.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "line %d: %s\n", __LINE__, #x); exit(1); } } while (0)

enum { ACCESS = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };
enum { DEPTH = 64, CQES = 256, MAX_BATCH = 16, MAX_SGES = 4, MAX_SIZE = 1 << 16 };

static char memory[2 * MAX_SIZE] __attribute__((aligned(4096))); // one half is the peer's

// What is measured.
static const char *op;
static int size, sges, batch;
static long count;
static int receive, inl;
static int all; // each request completes, not only the last one of a batch

static struct ibv_cq *cq;
static struct ibv_qp *qp;
static char *cqes;
static struct ibv_send_wr w[MAX_BATCH];
static struct ibv_recv_wr r[MAX_BATCH];
static int blocks = 1; // of the queue, that a request takes
static int polled;     // completions of a batch

static void to_rts(struct ibv_context *ctx)
{
	union ibv_gid gid;
	CHECK(!ibv_query_gid(ctx, 1, 0, &gid));
	struct ibv_qp_attr i = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = ACCESS };
	CHECK(!ibv_modify_qp(qp, &i, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	struct ibv_qp_attr r = { .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = qp->qp_num, .max_dest_rd_atomic = 1,
		.min_rnr_timer = 1, .ah_attr = { .is_global = 1, .port_num = 1, .grh = { .dgid = gid, .hop_limit = 1 } } };
	CHECK(!ibv_modify_qp(qp, &r, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
		IBV_QP_MIN_RNR_TIMER));
	struct ibv_qp_attr t = { .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1 };
	CHECK(!ibv_modify_qp(qp, &t, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC));
}

// An operation is how a request of that kind is posted, and what its completion calls it.
static const struct operation { const char *name; enum ibv_wr_opcode opcode; uint8_t code; } operations[] = {
	{ "write", IBV_WR_RDMA_WRITE, 0x08 }, { "inline", IBV_WR_RDMA_WRITE, 0x08 }, { "read", IBV_WR_RDMA_READ, 0x10 },
	{ "fetch-add", IBV_WR_ATOMIC_FETCH_AND_ADD, 0x12 }, { "send", IBV_WR_SEND, 0x0a }, { "recv", IBV_WR_SEND, 0x0a },
};

static const struct operation *operation(void)
{
	size_t i = 0, n = sizeof operations / sizeof operations[0];
	while (i < n && strcmp(operations[i].name, op))
		i++;
	CHECK(i < n);
	return &operations[i];
}

// open_queues makes a queue pair that is connected to itself, and returns its memory region.
static struct ibv_mr *open_queues(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	CHECK(list && list[0]);
	struct ibv_context *ctx = ibv_open_device(list[0]);
	CHECK(ctx);
	struct ibv_pd *pd = ibv_alloc_pd(ctx);
	struct ibv_mr *mr = ibv_reg_mr(pd, memory, sizeof memory, ACCESS | IBV_ACCESS_LOCAL_WRITE);
	cq = ibv_create_cq(ctx, CQES - 1, NULL, NULL, 0);
	CHECK(pd && mr && cq);
	struct ibv_qp_init_attr a = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .cap = { DEPTH, DEPTH, MAX_SGES, 2, inl ? size : 0 } };
	qp = ibv_create_qp(pd, &a);
	CHECK(qp);
	to_rts(ctx);
	return mr;
}

// prepare_cqes writes into the completions what stays as it is: all but the counter and the owner bit.
static void prepare_cqes(uint8_t code)
{
	struct mlx5dv_cq dv;
	struct mlx5dv_obj obj = { .cq = { .in = cq, .out = &dv } };
	CHECK(!mlx5dv_init_obj(&obj, MLX5DV_OBJ_CQ) && dv.cqe_cnt == CQES && dv.cqe_size == 64);
	cqes = dv.buf;
	for (int i = 0; i < CQES; i++) {
		struct mlx5_cqe64 *e = (struct mlx5_cqe64 *)(cqes + 64 * i);
		e->sop_drop_qpn = htobe32(code << 24 | qp->qp_num);
		e->byte_cnt = htobe32(size);
		e->srqn_uidx = 0;
		e->op_own = 0xf1;
	}
	// libmlx5 finds a queue pair by an index of its own choice, of which this is the first.
	struct mlx5dv_qp q;
	struct mlx5dv_obj o = { .qp = { .in = qp, .out = &q } };
	CHECK(!mlx5dv_init_obj(&o, MLX5DV_OBJ_QP));
}

// prepare_requests makes those of a batch. Their elements are equal pieces of SIZE bytes.
static void prepare_requests(enum ibv_wr_opcode opcode, struct ibv_mr *mr)
{
	static struct ibv_sge sge[MAX_BATCH][MAX_SGES];
	for (int i = 0; i < batch; i++) {
		for (int k = 0; k < sges; k++)
			sge[i][k] = (struct ibv_sge){ (uintptr_t)memory + size / sges * k, size / sges, mr->lkey };
		int last = i == batch - 1;
		w[i] = (struct ibv_send_wr){ .wr_id = i, .next = last ? NULL : &w[i + 1], .sg_list = sge[i], .num_sge = sges, .opcode = opcode,
			.send_flags = (last || all ? IBV_SEND_SIGNALED : 0) | (inl ? IBV_SEND_INLINE : 0) };
		if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
			w[i].wr.atomic.remote_addr = (uintptr_t)memory + MAX_SIZE;
			w[i].wr.atomic.rkey = mr->rkey;
			w[i].wr.atomic.compare_add = 1;
		} else if (opcode != IBV_WR_SEND) {
			w[i].wr.rdma.remote_addr = (uintptr_t)memory + MAX_SIZE;
			w[i].wr.rdma.rkey = mr->rkey;
		}
		r[i] = (struct ibv_recv_wr){ .wr_id = i, .next = last ? NULL : &r[i + 1], .sg_list = sge[i], .num_sge = sges };
	}
	int data = inl ? (4 + size + 15) / 16 * 16 : 16 * sges;
	if (!receive)
		blocks = (16 + (opcode == IBV_WR_SEND ? 0 : opcode == IBV_WR_ATOMIC_FETCH_AND_ADD ? 32 : 16) + data + 63) / 64;
	polled = all ? batch : 1;
}

static void post_batch(void)
{
	struct ibv_send_wr *badw;
	struct ibv_recv_wr *badr;
	if (receive)
		CHECK(!ibv_post_recv(qp, r, &badr));
	else
		CHECK(!ibv_post_send(qp, w, &badw));
}

// complete is the device: it writes the completions of a batch.
static void complete_batch(void)
{
	static uint32_t next;
	static uint16_t at; // blocks done
	for (int k = 0; k < polled; k++) {
		at += all ? blocks : batch * blocks;
		// As one word, as it comes from a device: narrower stores would hold up the poller's load.
		*(volatile uint32_t *)(cqes + 64 * (next & (CQES - 1)) + 60) =
			htobe32((uint32_t)(uint16_t)(at - blocks) << 16 | (receive ? 0x20 : 0) | (next / CQES & 1));
		next++;
	}
}

static void poll_batch(void)
{
	struct ibv_wc wc[MAX_BATCH];
	int n = ibv_poll_cq(cq, polled, wc);
	CHECK(n == polled && wc[0].status == IBV_WC_SUCCESS && wc[n - 1].wr_id == batch - 1u);
}

static double now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

// loop measures all of it together, in the thread's processor time, to which others on the machine do little.
static double loop(void)
{
	double from = now(CLOCK_THREAD_CPUTIME_ID);
	for (long i = 0; i < count; i += batch) {
		post_batch();
		complete_batch();
		poll_batch();
	}
	return (now(CLOCK_THREAD_CPUTIME_ID) - from) / count;
}

static double empty(void)
{
	struct ibv_wc wc[MAX_BATCH];
	double from = now(CLOCK_THREAD_CPUTIME_ID);
	for (long i = 0; i < count; i++)
		CHECK(ibv_poll_cq(cq, batch, wc) == 0);
	return (now(CLOCK_THREAD_CPUTIME_ID) - from) / count;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static double median(double *v, long n)
{
	qsort(v, n, sizeof *v, compare);
	return v[n / 2];
}

// part measures posting alone, or polling alone: a queue is filled, completed and emptied in turns, which takes so little that a clock
// without a system call is needed. That is one of the time that passes, so what counts is the turn in the middle, which nothing has
// interrupted. What the clock takes is measured likewise, and taken off.
static double part(int posting)
{
	long turns = count / DEPTH;
	CHECK(turns > 0 && DEPTH % batch == 0);
	double *took = calloc(turns, sizeof *took), *idle = calloc(turns, sizeof *idle);
	CHECK(took && idle);
	for (long i = 0; i < turns; i++) {
		double from = now(CLOCK_MONOTONIC), start = now(CLOCK_MONOTONIC);
		idle[i] = start - from;
		for (int k = 0; k < DEPTH; k += batch)
			post_batch();
		double posted = now(CLOCK_MONOTONIC);
		for (int k = 0; k < DEPTH; k += batch)
			complete_batch();
		double completed = now(CLOCK_MONOTONIC);
		for (int k = 0; k < DEPTH; k += batch)
			poll_batch();
		took[i] = posting ? posted - start : now(CLOCK_MONOTONIC) - completed;
	}
	return (median(took, turns) - median(idle, turns)) / DEPTH;
}

int main(int argc, char **argv)
{
	CHECK(argc == 7);
	op = argv[1];
	const char *what = argv[2];
	size = atoi(argv[3]), sges = atoi(argv[4]), batch = atoi(argv[5]), count = atol(argv[6]);
	CHECK(size >= 1 && size <= MAX_SIZE && sges >= 1 && sges <= MAX_SGES && batch >= 1 && batch <= MAX_BATCH);
	receive = !strcmp(op, "recv"), inl = !strcmp(op, "inline"), all = receive || !strcmp(what, "poll");

	const struct operation *o = operation();
	struct ibv_mr *mr = open_queues();
	prepare_cqes(o->code);
	prepare_requests(o->opcode, mr);
	double ns;
	if (!strcmp(what, "loop"))
		ns = loop();
	else if (!strcmp(what, "empty"))
		ns = empty();
	else
		ns = part(!strcmp(what, "post"));
	printf("%.3f\n", ns);
	return 0;
}
