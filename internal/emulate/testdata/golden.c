// Does what golden.script says, with stock libibverbs and libmlx5. The trace of the device is what is looked at.
#include <arpa/inet.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "line %d: %s\n", __LINE__, #x); exit(1); } } while (0)

enum { SIZE = 4096 };
static char *const at_a = (char *)0x200000000, *const at_b = (char *)0x200010000;

struct side {
	struct ibv_mr *mr;
	struct ibv_cq *cq;
	struct ibv_qp *qp;
};

static void make_qp(struct side *s, struct ibv_pd *pd)
{
	struct ibv_qp_init_attr a = { .send_cq = s->cq, .recv_cq = s->cq, .qp_type = IBV_QPT_RC, .cap = { 64, 64, 2, 2, 64 } };
	CHECK(s->qp = ibv_create_qp(pd, &a));
}

static void join(struct side *s, struct side *to, union ibv_gid gid)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };
	CHECK(!ibv_modify_qp(s->qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	struct ibv_qp_attr r = { .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = to->qp->qp_num, .max_dest_rd_atomic = 4,
		.min_rnr_timer = 12, .ah_attr = { .is_global = 1, .port_num = 1, .grh = { .dgid = gid, .hop_limit = 1 } } };
	CHECK(!ibv_modify_qp(s->qp, &r, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
		IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
	struct ibv_qp_attr t = { .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 4 };
	CHECK(!ibv_modify_qp(s->qp, &t, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
		IBV_QP_MAX_QP_RD_ATOMIC));
}

static void poll(struct side *s, enum ibv_wc_status want)
{
	struct ibv_wc wc;
	int n;
	while (!(n = ibv_poll_cq(s->cq, 1, &wc)))
		;
	CHECK(n == 1 && wc.status == want);
}

int main(int argc, char **argv)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	CHECK(list && list[0]);
	struct ibv_context *c = ibv_open_device(list[0]);
	CHECK(c);
	struct ibv_pd *pd = ibv_alloc_pd(c);
	CHECK(pd);
	struct side a, b;
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE |
		IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;
	CHECK(mmap(at_a, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0) == at_a && mmap(at_b, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0) == at_b);
	for (int i = 0; i < SIZE; i++)
		at_a[i] = i * 7;
	CHECK(a.mr = ibv_reg_mr(pd, at_a, SIZE, access));
	CHECK(b.mr = ibv_reg_mr(pd, at_b, SIZE, access));
	CHECK(a.cq = ibv_create_cq(c, 63, NULL, NULL, 0));
	CHECK(b.cq = ibv_create_cq(c, 63, NULL, NULL, 0));
	make_qp(&a, pd);
	make_qp(&b, pd);
	union ibv_gid gid;
	CHECK(!ibv_query_gid(c, 1, 0, &gid));
	join(&a, &b, gid);
	join(&b, &a, gid);

	FILE *f = fopen(argc > 1 ? argv[1] : "golden.script", "r");
	CHECK(f);
	char line[256], op[32];
	unsigned times, len, off, len2, off2, to;
	while (fgets(line, sizeof line, f)) {
		if (line[0] == '#')
			continue;
		CHECK(sscanf(line, "%31s %u %u %u %u %u %u", op, &times, &len, &off, &len2, &off2, &to) == 7);
		struct ibv_sge sge[2] = { { (uintptr_t)at_a + off, len, a.mr->lkey }, { (uintptr_t)at_a + off2, len2, a.mr->lkey } };
		struct ibv_send_wr wr = { .sg_list = sge, .num_sge = len ? len2 ? 2 : 1 : 0, .opcode = IBV_WR_SEND, .send_flags = IBV_SEND_SIGNALED }, *bad;
		struct ibv_sge rsge = { (uintptr_t)at_b + 2048, 1024, b.mr->lkey };
		struct ibv_recv_wr rr = { .sg_list = &rsge, .num_sge = 1 }, *badr;
		int recv = 0;
		wr.wr.rdma.remote_addr = (uintptr_t)at_b + to;
		wr.wr.rdma.rkey = b.mr->rkey;
		if (strstr(op, "inline"))
			wr.send_flags |= IBV_SEND_INLINE;
		if (!strcmp(op, "solicited"))
			wr.send_flags |= IBV_SEND_SOLICITED;
		if (!strcmp(op, "fenced"))
			wr.send_flags |= IBV_SEND_FENCE;
		if (!strcmp(op, "sendimm") || !strcmp(op, "inlineimm"))
			wr.opcode = IBV_WR_SEND_WITH_IMM;
		else if (!strcmp(op, "write") || !strcmp(op, "inlinewrite") || !strcmp(op, "badkey") || !strcmp(op, "fenced"))
			wr.opcode = IBV_WR_RDMA_WRITE;
		else if (!strcmp(op, "writeimm"))
			wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
		else if (!strcmp(op, "read"))
			wr.opcode = IBV_WR_RDMA_READ;
		else if (!strcmp(op, "fetchadd") || !strcmp(op, "compareswap")) {
			wr.opcode = op[0] == 'f' ? IBV_WR_ATOMIC_FETCH_AND_ADD : IBV_WR_ATOMIC_CMP_AND_SWP;
			wr.wr.atomic.remote_addr = (uintptr_t)at_b + to;
			wr.wr.atomic.rkey = b.mr->rkey;
			wr.wr.atomic.compare_add = 5;
			wr.wr.atomic.swap = op[0] == 'f' ? 0 : 9;
		}
		if (wr.opcode == IBV_WR_SEND_WITH_IMM || wr.opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
			wr.imm_data = htonl(0xcafe);
		recv = wr.opcode == IBV_WR_SEND || wr.opcode == IBV_WR_SEND_WITH_IMM || wr.opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
		if (!strcmp(op, "badkey"))
			wr.wr.rdma.rkey = 0xdead00;
		for (; times; times--) {
			if (recv)
				CHECK(!ibv_post_recv(b.qp, &rr, &badr));
			CHECK(!ibv_post_send(a.qp, &wr, &bad));
			poll(&a, strcmp(op, "badkey") ? IBV_WC_SUCCESS : IBV_WC_REM_ACCESS_ERR);
			if (recv)
				poll(&b, IBV_WC_SUCCESS);
		}
	}
	CHECK(!ibv_destroy_qp(a.qp) && !ibv_destroy_qp(b.qp) && !ibv_destroy_cq(a.cq) && !ibv_destroy_cq(b.cq));
	CHECK(!ibv_dereg_mr(a.mr) && !ibv_dereg_mr(b.mr) && !ibv_dealloc_pd(pd) && !ibv_close_device(c));
	return 0;
}
