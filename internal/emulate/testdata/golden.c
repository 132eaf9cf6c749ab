// Does what lists of operations say, with stock libibverbs and libmlx5. The trace of the device is what is looked at.
// golden_linux_test.go has the language of the lists, and does the same with another driver.
#include <arpa/inet.h>
#include <infiniband/mlx5dv.h>
#include <infiniband/verbs.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static int line_number;

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "line %d of the lists, %d of the program: %s\n", line_number, __LINE__, #x); exit(1); } } while (0)

enum { SIZE = 8192, MAX_WR = 64, MAX_SGE = 8, QKEY = 0x11111111, WRONG_KEY = 0xdead00 };

struct side {
	char *mem;
	struct ibv_mr *mr;
	struct ibv_cq *cq;
	struct ibv_srq *srq;
	struct ibv_qp *qp;
	struct ibv_ah *ah;
	struct ibv_mw *mw;
	uint32_t key; // the window's
	struct ibv_flow *flow;
};

static struct side sides[2] = { { .mem = (char *)0x200000000 }, { .mem = (char *)0x200010000 } };
static struct ibv_context *ctx;
static struct ibv_pd *pd;
static union ibv_gid gid;
static enum ibv_qp_type type;
static int rnr; // how often a request waits for a receive, from the next join on

enum { RIGHTS = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };

// Frames are from one side to the other, by the addresses that each side's memory begins with.
static const uint8_t macs[2][6] = { { 2, 0, 0, 0, 0, 0xa }, { 2, 0, 0, 0, 0, 0xb } };

static void make_raw(struct side *s, struct ibv_qp_init_attr *a)
{
	int i = s - sides;
	struct ibv_qp_init_attr_ex x = { .send_cq = a->send_cq, .recv_cq = a->recv_cq, .cap = a->cap, .qp_type = a->qp_type,
		.sq_sig_all = a->sq_sig_all, .comp_mask = IBV_QP_INIT_ATTR_PD, .pd = pd };
	struct mlx5dv_qp_init_attr m = { .comp_mask = MLX5DV_QP_INIT_ATTR_MASK_QP_CREATE_FLAGS,
		.create_flags = MLX5DV_QP_CREATE_TIR_ALLOW_SELF_LOOPBACK_UC | MLX5DV_QP_CREATE_TIR_ALLOW_SELF_LOOPBACK_MC };
	CHECK(s->qp = mlx5dv_create_qp(ctx, &x, &m));
	struct { struct ibv_flow_attr attr; struct ibv_flow_spec_eth eth; } f = {
		.attr = { .size = sizeof f, .num_of_specs = 1, .port = 1 }, .eth = { .type = IBV_FLOW_SPEC_ETH, .size = sizeof f.eth } };
	memcpy(f.eth.val.dst_mac, macs[i], 6);
	memset(f.eth.mask.dst_mac, 0xff, 6);
	CHECK(s->flow = ibv_create_flow(s->qp, &f.attr));
	memcpy(s->mem, macs[!i], 6);
	memcpy(s->mem + 6, macs[i], 6);
	s->mem[12] = 0x88;
	s->mem[13] = 0xb5;
}

static void join_raw(struct side *s)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1 };
	CHECK(!ibv_modify_qp(s->qp, &a, IBV_QP_STATE | IBV_QP_PORT));
	a.qp_state = IBV_QPS_RTR;
	CHECK(!ibv_modify_qp(s->qp, &a, IBV_QP_STATE));
	a.qp_state = IBV_QPS_RTS;
	CHECK(!ibv_modify_qp(s->qp, &a, IBV_QP_STATE));
}

static uint16_t lid; /* of the port, on InfiniBand */

static void join(struct side *s, struct side *to)
{
	if (type == IBV_QPT_RAW_PACKET) {
		join_raw(s);
		return;
	}
	struct ibv_qp_attr i = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = QKEY, .qp_access_flags = type == IBV_QPT_UC ? IBV_ACCESS_REMOTE_WRITE : RIGHTS };
	CHECK(!ibv_modify_qp(s->qp, &i, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | (type == IBV_QPT_UD ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS)));
	struct ibv_qp_attr r = { .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_1024, .dest_qp_num = to->qp->qp_num, .max_dest_rd_atomic = 4,
		.min_rnr_timer = 1, .ah_attr = { .is_global = 1, .port_num = 1, .grh = { .dgid = gid, .hop_limit = 1 } } };
	if (lid)
		r.ah_attr = (struct ibv_ah_attr){ .dlid = lid, .port_num = 1 };
	int mask = IBV_QP_STATE;
	if (type != IBV_QPT_UD)
		mask |= IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
	if (type == IBV_QPT_RC)
		mask |= IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
	CHECK(!ibv_modify_qp(s->qp, &r, mask));
	struct ibv_qp_attr t = { .qp_state = IBV_QPS_RTS, .timeout = 18, .retry_cnt = 7, .rnr_retry = rnr, .max_rd_atomic = 4 };
	mask = IBV_QP_STATE | IBV_QP_SQ_PSN;
	if (type == IBV_QPT_RC)
		mask |= IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
	CHECK(!ibv_modify_qp(s->qp, &t, mask));
}

static void reset(struct side *s)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_RESET };
	CHECK(!ibv_modify_qp(s->qp, &a, IBV_QP_STATE));
}

static void address(struct side *s, int sgid, unsigned label, int sl, int tc, int hop)
{
	int global = !lid || sgid;
	if (lid)
		sgid = 0;
	struct ibv_ah_attr h = { .is_global = global, .dlid = lid, .port_num = 1, .sl = sl,
		.grh = { .flow_label = label, .sgid_index = sgid, .hop_limit = hop, .traffic_class = tc } };
	CHECK(!ibv_query_gid(ctx, 1, sgid, &h.grh.dgid));
	if (s->ah)
		CHECK(!ibv_destroy_ah(s->ah));
	CHECK(s->ah = ibv_create_ah(pd, &h));
}

static void begin(const char *line)
{
	char kind[8];
	int sges, inl, depth, rsges, rdepth, srq, sigall, windows;
	CHECK(sscanf(line, "list %7s %d %d %d %d %d %d %d %d", kind, &sges, &inl, &depth, &rsges, &rdepth, &srq, &sigall, &windows) == 9);
	type = !strcmp(kind, "rc") ? IBV_QPT_RC : !strcmp(kind, "uc") ? IBV_QPT_UC : !strcmp(kind, "ud") ? IBV_QPT_UD : IBV_QPT_RAW_PACKET;
	for (int i = 0; i < 2; i++) {
		struct side *s = &sides[i];
		for (int k = 0; k < SIZE; k++)
			s->mem[k] = k * (i ? 3 : 7);
		CHECK(s->cq = ibv_create_cq(ctx, 255, NULL, NULL, 0));
		struct ibv_srq_init_attr q = { .attr = { .max_wr = rdepth, .max_sge = rsges } };
		if (srq)
			CHECK(s->srq = ibv_create_srq(pd, &q));
		struct ibv_qp_init_attr a = { .send_cq = s->cq, .recv_cq = s->cq, .srq = s->srq, .qp_type = type, .sq_sig_all = sigall,
			.cap = { depth, srq ? 0 : rdepth, sges, srq ? 0 : rsges, inl } };
		if (type == IBV_QPT_RAW_PACKET)
			make_raw(s, &a);
		else
			CHECK(s->qp = ibv_create_qp(pd, &a));
		if (windows) {
			CHECK(s->mw = ibv_alloc_mw(pd, IBV_MW_TYPE_2));
			s->key = s->mw->rkey;
		}
		if (type == IBV_QPT_UD)
			address(s, 0, 0, 0, 0, 1);
	}
	rnr = 7;
	join(&sides[0], &sides[1]);
	join(&sides[1], &sides[0]);
}

static void end(void)
{
	for (int i = 0; i < 2; i++) {
		struct side *s = &sides[i];
		if (s->flow)
			CHECK(!ibv_destroy_flow(s->flow));
		CHECK(!ibv_destroy_qp(s->qp));
		if (s->srq)
			CHECK(!ibv_destroy_srq(s->srq));
		if (s->mw)
			CHECK(!ibv_dealloc_mw(s->mw));
		if (s->ah)
			CHECK(!ibv_destroy_ah(s->ah));
		CHECK(!ibv_destroy_cq(s->cq));
		s->qp = NULL, s->srq = NULL, s->mw = NULL, s->ah = NULL, s->cq = NULL, s->flow = NULL;
	}
}

static void wait_for(struct side *s, int n)
{
	struct timespec from, now;
	clock_gettime(CLOCK_MONOTONIC, &from);
	while (n > 0) {
		struct ibv_wc wc;
		int k = ibv_poll_cq(s->cq, 1, &wc);
		CHECK(k >= 0);
		if (!(n -= k))
			break;
		if (!k)
			sched_yield();
		clock_gettime(CLOCK_MONOTONIC, &now);
		CHECK(now.tv_sec - from.tv_sec < 60);
	}
}

static struct ibv_send_wr wrs[MAX_WR];
static struct ibv_recv_wr rrs[MAX_WR];
static struct ibv_sge sges[MAX_WR][MAX_SGE];
static struct side *sender;
static int count;

static int scatter(char *at, struct side *s, uint32_t lkey)
{
	int n, used;
	CHECK(count < MAX_WR && sscanf(at, "%d%n", &n, &used) == 1 && n <= MAX_SGE);
	for (int i = 0; i < n; i++) {
		unsigned off, len;
		CHECK(sscanf(at += used, "%u %u%n", &off, &len, &used) == 2);
		sges[count][i] = (struct ibv_sge){ (uintptr_t)s->mem + off, len, lkey };
	}
	return n;
}

// wr SIDE OP FLAGS TO KEY N [OFF LEN]...
static void request(char *line)
{
	static const struct { const char *name; enum ibv_wr_opcode op; } ops[] = {
		{ "send", IBV_WR_SEND }, { "sendimm", IBV_WR_SEND_WITH_IMM }, { "sendinv", IBV_WR_SEND_WITH_INV }, { "write", IBV_WR_RDMA_WRITE },
		{ "writeimm", IBV_WR_RDMA_WRITE_WITH_IMM }, { "read", IBV_WR_RDMA_READ }, { "fetchadd", IBV_WR_ATOMIC_FETCH_AND_ADD },
		{ "cmpswap", IBV_WR_ATOMIC_CMP_AND_SWP }, { "bind", IBV_WR_BIND_MW }, { "inv", IBV_WR_LOCAL_INV } };
	char who, op[16], flags[16], key;
	unsigned to;
	int used;
	CHECK(sscanf(line, "wr %c %15s %15s %u %c%n", &who, op, flags, &to, &key, &used) == 5);
	struct side *s = sender = &sides[who == 'b'], *peer = &sides[who != 'b'];
	struct ibv_send_wr *w = &wrs[count];
	*w = (struct ibv_send_wr){ .sg_list = sges[count] };
	w->num_sge = scatter(line + used, s, strchr(flags, 'l') ? WRONG_KEY : s->mr->lkey);
	size_t i;
	for (i = 0; i < sizeof ops / sizeof *ops && strcmp(ops[i].name, op); i++)
		;
	CHECK(i < sizeof ops / sizeof *ops);
	w->opcode = ops[i].op;
	w->send_flags = (strchr(flags, 's') ? IBV_SEND_SIGNALED : 0) | (strchr(flags, 'e') ? IBV_SEND_SOLICITED : 0) |
		(strchr(flags, 'f') ? IBV_SEND_FENCE : 0) | (strchr(flags, 'i') ? IBV_SEND_INLINE : 0) | (strchr(flags, 'c') ? IBV_SEND_IP_CSUM : 0);
	uint32_t rkey = key == 'w' ? peer->key : key == 'x' ? WRONG_KEY : peer->mr->rkey;
	switch (w->opcode) {
	case IBV_WR_SEND_WITH_INV:
		w->invalidate_rkey = rkey;
		break;
	case IBV_WR_LOCAL_INV:
		w->invalidate_rkey = s->key;
		break;
	case IBV_WR_BIND_MW:
		s->mw->rkey = s->key; // libmlx5 tells the device that; keeping it is the program's business
		s->key = w->bind_mw.rkey = ibv_inc_rkey(s->key);
		w->bind_mw.mw = s->mw;
		w->bind_mw.bind_info = (struct ibv_mw_bind_info){ s->mr, sges[count][0].addr, sges[count][0].length, RIGHTS };
		w->num_sge = 0;
		break;
	case IBV_WR_ATOMIC_FETCH_AND_ADD:
	case IBV_WR_ATOMIC_CMP_AND_SWP:
		w->wr.atomic.remote_addr = (uintptr_t)peer->mem + to;
		w->wr.atomic.rkey = rkey;
		w->wr.atomic.compare_add = 5 + to;
		w->wr.atomic.swap = w->opcode == IBV_WR_ATOMIC_CMP_AND_SWP ? 9 : 0;
		break;
	default:
		w->imm_data = w->opcode == IBV_WR_SEND_WITH_IMM || w->opcode == IBV_WR_RDMA_WRITE_WITH_IMM ? htonl(0xcafe0000 + to) : 0;
		if (type == IBV_QPT_UD) {
			w->wr.ud.ah = s->ah;
			w->wr.ud.remote_qpn = peer->qp->qp_num;
			w->wr.ud.remote_qkey = QKEY;
		} else if (type != IBV_QPT_RAW_PACKET) {
			w->wr.rdma.remote_addr = (uintptr_t)peer->mem + to;
			w->wr.rdma.rkey = rkey;
		}
	}
	if (count++)
		wrs[count - 2].next = w;
}

int main(int argc, char **argv)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	CHECK(list && list[0] && (ctx = ibv_open_device(list[0])) && (pd = ibv_alloc_pd(ctx)) && !ibv_query_gid(ctx, 1, 0, &gid));
	struct ibv_port_attr port;
	CHECK(!ibv_query_port(ctx, 1, &port));
	if (port.link_layer == IBV_LINK_LAYER_INFINIBAND)
		lid = port.lid;
	for (int i = 0; i < 2; i++) {
		struct side *s = &sides[i];
		CHECK(mmap(s->mem, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == s->mem);
		CHECK(s->mr = ibv_reg_mr(pd, s->mem, SIZE, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND | RIGHTS));
	}
	FILE *f;
	CHECK(argc == 2 && (f = fopen(argv[1], "r")));
	char line[1024];
	while (line_number++, fgets(line, sizeof line, f)) {
		char who;
		int n, used, sl, tc, hop;
		unsigned label;
		if (line[0] == '#') {
		} else if (!strncmp(line, "list ", 5)) {
			begin(line);
		} else if (!strncmp(line, "end", 3)) {
			end();
		} else if (!strncmp(line, "wr ", 3)) {
			request(line);
		} else if (!strncmp(line, "post", 4)) {
			struct ibv_send_wr *bad;
			CHECK(!ibv_post_send(sender->qp, wrs, &bad));
			count = 0;
		} else if (sscanf(line, "rr %c%n", &who, &used) == 1 || sscanf(line, "rl %c%n", &who, &used) == 1) {
			struct side *s = &sides[who == 'b'];
			n = scatter(line + used, s, line[1] == 'l' ? WRONG_KEY : s->mr->lkey);
			rrs[count] = (struct ibv_recv_wr){ .sg_list = sges[count], .num_sge = n };
			if (count++)
				rrs[count - 2].next = &rrs[count - 1];
		} else if (sscanf(line, "recv %c", &who) == 1) {
			struct side *s = &sides[who == 'b'];
			struct ibv_recv_wr *bad;
			CHECK(!(s->srq ? ibv_post_srq_recv(s->srq, rrs, &bad) : ibv_post_recv(s->qp, rrs, &bad)));
			count = 0;
		} else if (sscanf(line, "wait %c %d", &who, &n) == 2) {
			wait_for(&sides[who == 'b'], n);
		} else if (sscanf(line, "arm %c %d", &who, &n) == 2) {
			CHECK(!ibv_req_notify_cq(sides[who == 'b'].cq, n));
		} else if (sscanf(line, "to %c %d %u %d %d %d", &who, &n, &label, &sl, &tc, &hop) == 6) {
			address(&sides[who == 'b'], n, label, sl, tc, hop);
		} else if (sscanf(line, "resize %c %d", &who, &n) == 2) {
			CHECK(!ibv_resize_cq(sides[who == 'b'].cq, n));
		} else {
			CHECK(!strncmp(line, "reset", 5));
			if (sscanf(line, "reset %d", &rnr) != 1)
				rnr = 7;
			reset(&sides[0]);
			reset(&sides[1]);
			join(&sides[0], &sides[1]);
			join(&sides[1], &sides[0]);
		}
	}
	for (int i = 0; i < 2; i++)
		CHECK(!ibv_dereg_mr(sides[i].mr));
	CHECK(!ibv_dealloc_pd(pd) && !ibv_close_device(ctx));
	return 0;
}
