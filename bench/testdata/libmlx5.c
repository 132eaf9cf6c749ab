// What posting and polling cost with stock libmlx5, where completions are instant: this program writes each CQE itself, as the driver of
// this repository's benchmark does (internal/provider/mlx5, TestMeasure). Nobody looks at its doorbells.
//
//	libmlx5 write|inline|send|recv|empty SIZE BATCH COUNT
//
// prints the processor time of a request, in nanoseconds (of a poll, if empty). Of a batch the last request is signalled.
#include <arpa/inet.h>
#include <endian.h>
#include <infiniband/mlx5dv.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "line %d: %s\n", __LINE__, #x); exit(1); } } while (0)

enum { DEPTH = 64, CQES = 256, MAX_BATCH = 16 };

static char memory[1 << 16] __attribute__((aligned(4096)));

static void to_rts(struct ibv_context *ctx, struct ibv_qp *qp)
{
	union ibv_gid gid;
	CHECK(!ibv_query_gid(ctx, 1, 0, &gid));
	struct ibv_qp_attr i = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE };
	CHECK(!ibv_modify_qp(qp, &i, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	struct ibv_qp_attr r = { .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = qp->qp_num, .max_dest_rd_atomic = 1,
		.min_rnr_timer = 1, .ah_attr = { .is_global = 1, .port_num = 1, .grh = { .dgid = gid, .hop_limit = 1 } } };
	CHECK(!ibv_modify_qp(qp, &r, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
		IBV_QP_MIN_RNR_TIMER));
	struct ibv_qp_attr t = { .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1 };
	CHECK(!ibv_modify_qp(qp, &t, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC));
}

static double cpu(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(int argc, char **argv)
{
	CHECK(argc == 5);
	const char *op = argv[1];
	int size = atoi(argv[2]), batch = atoi(argv[3]);
	long count = atol(argv[4]);
	int empty = !strcmp(op, "empty"), recv = !strcmp(op, "recv"), inl = !strcmp(op, "inline"), send = !strcmp(op, "send");
	CHECK(batch >= 1 && batch <= MAX_BATCH && size >= 1 && size <= 4096);

	struct ibv_device **list = ibv_get_device_list(NULL);
	CHECK(list && list[0]);
	struct ibv_context *ctx = ibv_open_device(list[0]);
	CHECK(ctx);
	struct ibv_pd *pd = ibv_alloc_pd(ctx);
	struct ibv_mr *mr = ibv_reg_mr(pd, memory, sizeof memory, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	struct ibv_cq *cq = ibv_create_cq(ctx, CQES - 1, NULL, NULL, 0);
	CHECK(pd && mr && cq);
	struct ibv_qp_init_attr a = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .cap = { DEPTH, DEPTH, 2, 2, inl ? size : 0 } };
	struct ibv_qp *qp = ibv_create_qp(pd, &a);
	CHECK(qp);
	to_rts(ctx, qp);

	struct mlx5dv_cq dv;
	struct mlx5dv_obj obj = { .cq = { .in = cq, .out = &dv } };
	CHECK(!mlx5dv_init_obj(&obj, MLX5DV_OBJ_CQ) && dv.cqe_cnt == CQES && dv.cqe_size == 64);
	for (int i = 0; i < CQES; i++) { // all but the counter and the owner bit stays as it is
		struct mlx5_cqe64 *e = (struct mlx5_cqe64 *)((char *)dv.buf + 64 * i);
		e->sop_drop_qpn = htobe32((send ? 0x0a : 0x08) << 24 | qp->qp_num);
		e->byte_cnt = htobe32(recv ? size : 0);
		e->srqn_uidx = 0;
		e->op_own = 0xf1;
	}
	{ // libmlx5 finds a queue pair by an index of its own choice, of which this is the first
		struct mlx5dv_qp q;
		struct mlx5dv_obj o = { .qp = { .in = qp, .out = &q } };
		CHECK(!mlx5dv_init_obj(&o, MLX5DV_OBJ_QP));
	}
	int blocks = inl ? (16 + 16 + (4 + size + 15) / 16 * 16 + 63) / 64 : 1;

	struct ibv_sge sge[MAX_BATCH];
	struct ibv_send_wr w[MAX_BATCH], *badw;
	struct ibv_recv_wr r[MAX_BATCH], *badr;
	for (int i = 0; i < batch; i++) {
		sge[i] = (struct ibv_sge){ (uintptr_t)memory, size, mr->lkey };
		w[i] = (struct ibv_send_wr){ .wr_id = i, .next = i < batch - 1 ? &w[i + 1] : NULL, .sg_list = &sge[i], .num_sge = 1,
			.opcode = send ? IBV_WR_SEND : IBV_WR_RDMA_WRITE, .send_flags = (i == batch - 1 ? IBV_SEND_SIGNALED : 0) | (inl ? IBV_SEND_INLINE : 0),
			.wr.rdma = { (uintptr_t)memory + 8192, mr->rkey } };
		r[i] = (struct ibv_recv_wr){ .wr_id = i, .next = w[i].next ? &r[i + 1] : NULL, .sg_list = &sge[i], .num_sge = 1 };
	}
	uint32_t next = 0;
	uint16_t at = 0;
	struct ibv_wc wc[MAX_BATCH];
	int polled = recv ? batch : 1; // each receive completes
	double from = cpu();
	for (long i = 0; i < count; i += empty ? 1 : batch) {
		if (empty) {
			CHECK(ibv_poll_cq(cq, 1, wc) == 0);
			continue;
		}
		if (recv)
			CHECK(!ibv_post_recv(qp, r, &badr));
		else
			CHECK(!ibv_post_send(qp, w, &badw));
		for (int k = 0; k < polled; k++) {
			at += recv ? 1 : batch * blocks;
			// As one word, as it comes from a device: narrower stores would hold up the poller's load.
			*(volatile uint32_t *)((char *)dv.buf + 64 * (next & (CQES - 1)) + 60) =
				htobe32((uint32_t)(uint16_t)(at - (recv ? 1 : blocks)) << 16 | (recv ? 0x20 : 0) | (next / CQES & 1));
			next++;
		}
		int n = ibv_poll_cq(cq, polled, wc);
		CHECK(n == polled && wc[0].status == IBV_WC_SUCCESS && wc[n - 1].wr_id == batch - 1u);
	}
	printf("%.3f\n", (cpu() - from) / count);
	return 0;
}
