package abi

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"testing"
)

// Numbers written down from the kernel's documentation and sources, not from what genabi reads: they notice if it reads
// wrongly (a sign, a byte order, the wrong enum).
func TestKnownNumbers(t *testing.T) {
	for name, c := range map[string]struct{ got, want uint64 }{
		"RDMA_VERBS_IOCTL":                    {RDMA_VERBS_IOCTL, 0xC0181B01},
		"IB_USER_VERBS_CMD_GET_CONTEXT":       {IB_USER_VERBS_CMD_GET_CONTEXT, 0},
		"IB_USER_VERBS_CMD_POST_SEND":         {IB_USER_VERBS_CMD_POST_SEND, 28},
		"IB_USER_VERBS_CMD_OPEN_QP":           {IB_USER_VERBS_CMD_OPEN_QP, 40},
		"IB_USER_VERBS_EX_CMD_MODIFY_CQ":      {IB_USER_VERBS_EX_CMD_MODIFY_CQ, 57},
		"IB_USER_VERBS_CMD_FLAG_EXTENDED":     {IB_USER_VERBS_CMD_FLAG_EXTENDED, 1 << 31},
		"IB_UVERBS_ACCESS_RELAXED_ORDERING":   {IB_UVERBS_ACCESS_RELAXED_ORDERING, 0x100000},
		"IB_UVERBS_ACCESS_OPTIONAL_RANGE":     {IB_UVERBS_ACCESS_OPTIONAL_RANGE, 0x3ff00000},
		"IB_UVERBS_PCF_HIERARCHY_INFO_SUP":    {IB_UVERBS_PCF_HIERARCHY_INFO_SUP, 1 << 31},
		"IB_UVERBS_DEVICE_RAW_SCATTER_FCS":    {IB_UVERBS_DEVICE_RAW_SCATTER_FCS, 1 << 34},
		"IB_UVERBS_QPT_XRC_TGT":               {IB_UVERBS_QPT_XRC_TGT, 10},
		"IB_UVERBS_QPT_DRIVER":                {IB_UVERBS_QPT_DRIVER, 255},
		"UVERBS_OBJECT_ASYNC_EVENT":           {UVERBS_OBJECT_ASYNC_EVENT, 16},
		"UVERBS_METHOD_QUERY_GID_TABLE":       {UVERBS_METHOD_QUERY_GID_TABLE, 5},
		"UVERBS_METHOD_REG_DMABUF_MR":         {UVERBS_METHOD_REG_DMABUF_MR, 4},
		"UVERBS_ATTR_UHW_OUT":                 {UVERBS_ATTR_UHW_OUT, 0x1001},
		"UVERBS_ATTR_CREATE_SRQ_RESP_SRQ_NUM": {UVERBS_ATTR_CREATE_SRQ_RESP_SRQ_NUM, 13},
		"RDMA_DRIVER_RXE":                     {RDMA_DRIVER_RXE, 14},
		"RDMA_DRIVER_SIW":                     {RDMA_DRIVER_SIW, 18},
		"SIW_INVAL_UOBJ_KEY":                  {SIW_INVAL_UOBJ_KEY, 0x090000},
		"SIW_MAX_INLINE":                      {SIW_MAX_INLINE, 80},
		"SIW_OP_RECEIVE":                      {SIW_OP_RECEIVE, 8},
		"SIW_WC_GENERAL_ERR":                  {SIW_WC_GENERAL_ERR, 9},
		"MLX5_QP_FLAG_UAR_PAGE_INDEX":         {MLX5_QP_FLAG_UAR_PAGE_INDEX, 0x400},
		"MLX5_IB_OBJECT_UAR":                  {MLX5_IB_OBJECT_UAR, 0x1008},
		"RDMA_PS_TCP":                         {RDMA_PS_TCP, 0x0106},
		"RDMA_USER_CM_CMD_JOIN_MCAST":         {RDMA_USER_CM_CMD_JOIN_MCAST, 22},
		"RDMA_NL_NLDEV":                       {RDMA_NL_NLDEV, 5},
		"RDMA_NLDEV_CMD_GET_CHARDEV":          {RDMA_NLDEV_CMD_GET_CHARDEV, 15},
		"RDMA_NLDEV_ATTR_LINK_TYPE":           {RDMA_NLDEV_ATTR_LINK_TYPE, 65},
		"RDMA_NLDEV_ATTR_UVERBS_DRIVER_ID":    {RDMA_NLDEV_ATTR_UVERBS_DRIVER_ID, 73},
		"RDMA_NLDEV_SYS_ATTR_COPY_ON_FORK":    {RDMA_NLDEV_SYS_ATTR_COPY_ON_FORK, 93},

		"IoctlHdr":                      {uint64(binary.Size(IoctlHdr{})), 24},
		"IoctlAttr":                     {uint64(binary.Size(IoctlAttr{})), 16},
		"WC":                            {uint64(binary.Size(WC{})), 48},
		"ModifyQP":                      {uint64(binary.Size(ModifyQP{})), 112},
		"ExQueryDeviceResp":             {uint64(binary.Size(ExQueryDeviceResp{})), 304},
		"QueryPortRespEx":               {uint64(binary.Size(QueryPortRespEx{})), 48},
		"RxeQueueBuf":                   {uint64(binary.Size(RxeQueueBuf{})), 384},
		"RxeQueueBufDataOffset":         {RxeQueueBufDataOffset, 384},
		"RxeSendWQE":                    {uint64(binary.Size(RxeSendWQE{})), 208},
		"RxeRecvWQE":                    {uint64(binary.Size(RxeRecvWQE{})), 40},
		"RxeAV":                         {uint64(binary.Size(RxeAV{})), 88},
		"SiwSQE":                        {uint64(binary.Size(SiwSQE{})), 120},
		"SiwRQE":                        {uint64(binary.Size(SiwRQE{})), 112},
		"SiwCQE":                        {uint64(binary.Size(SiwCQE{})), 32},
		"Mlx5CreateQP":                  {uint64(binary.Size(Mlx5CreateQP{})), 56},
		"CMEventResp":                   {uint64(binary.Size(CMEventResp{})), 336},
		"CMResolveAddr":                 {uint64(binary.Size(CMResolveAddr{})), 272},
		"RegMRRespDriverDataOffset":     {RegMRRespDriverDataOffset, 12},
		"RxeSendWRRdmaRemoteAddrOffset": {RxeSendWRRdmaRemoteAddrOffset, 24},
		"RxeSendWRAtomicSwapOffset":     {RxeSendWRAtomicSwapOffset, 40},
		"RxeSendWRUDAHNumOffset":        {RxeSendWRUDAHNumOffset, 36},
		"RxeSendWRUDAVOffset":           {RxeSendWRUDAVOffset, 56},
		"RxeSendWRMWAccessOffset":       {RxeSendWRMWAccessOffset, 52},
		"CMEventRespConnOffset":         {CMEventRespConnOffset, 20},
	} {
		if c.got != c.want {
			t.Errorf("%s = %#x, want %#x", name, c.got, c.want)
		}
	}
}

func TestBigEndian(t *testing.T) {
	for _, c := range []struct {
		v    any
		want string
	}{
		{ToBE16(0x0102), "0102"}, {ToBE32(0x01020304), "01020304"}, {ToBE64(0x0102030405060708), "0102030405060708"},
	} {
		got, err := binary.Append(nil, binary.NativeEndian, c.v)
		if err != nil {
			t.Fatal(err)
		}
		if hex.EncodeToString(got) != c.want {
			t.Errorf("%T: %x in memory, want %s", c.v, got, c.want)
		}
	}
	if v := FromBE16(ToBE16(0xfedc)); v != 0xfedc {
		t.Errorf("16 bits: %#x", v)
	}
	if v := FromBE32(ToBE32(0xfedcba98)); v != 0xfedcba98 {
		t.Errorf("32 bits: %#x", v)
	}
	if v := FromBE64(ToBE64(0xfedcba9876543210)); v != 0xfedcba9876543210 {
		t.Errorf("64 bits: %#x", v)
	}
}

// A command and a work request as they lie in memory of a little-endian machine, written down byte by byte.
func TestGoldenBytes(t *testing.T) {
	send := RxeSendWQE{
		WR:   RxeSendWR{WRID: 0x1122334455667788, Opcode: IB_UVERBS_WR_RDMA_WRITE, SendFlags: 2},
		IOVA: 0x7f0000001000,
		DMA:  RxeDMAInfo{Length: 0x40, Resid: 0x40, NumSGE: 1},
	}
	send.WR.WR[(RxeSendWRRdmaRemoteAddrOffset-24)/8] = 0x7f0000001000
	send.WR.WR[(RxeSendWRRdmaRKeyOffset-24)/8] = 0xabcd
	for _, c := range []struct {
		name string
		v    any
		want string
	}{
		{"RegMR", RegMR{Start: 0x7f0012345000, Length: 0x2000, HCAVA: 0x7f0012345000, PDHandle: 3, AccessFlags: IB_UVERBS_ACCESS_LOCAL_WRITE | IB_UVERBS_ACCESS_REMOTE_READ}, `
			0000000000000000 0050341200 7f0000 0020000000000000 0050341200 7f0000 03000000 05000000`},
		{"RxeSendWQE", send, `
			8877665544332211 00000000 00000000 02000000 00000000
			00100000007f0000 cdab0000 00000000
			` + strings.Repeat("00", 104) + `
			00000000 00000000 00100000007f0000 00000000 00000000 00000000 00000000 00000000 00000000
			40000000 40000000 00000000 01000000 00000000 00000000`},
		{"IoctlAttr", IoctlAttr{AttrID: UVERBS_ATTR_UHW_IN, Len: 8, Flags: UVERBS_ATTR_F_MANDATORY, Data: 0x0102}, `
			0010 0800 0100 0000 0201000000000000`},
	} {
		got, err := binary.Append(nil, binary.LittleEndian, c.v)
		if err != nil {
			t.Fatal(err)
		}
		want, err := hex.DecodeString(strings.Join(strings.Fields(c.want), ""))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s:\n got %x\nwant %x", c.name, got, want)
		}
	}
}
