//go:build amd64 || arm64

package mlx5

import (
	"fmt"
	"math/bits"
	"os"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/uverbs"
)

var pageBytes = os.Getpagesize()

// contextRequest is what the kernel is asked for. Kernels that name their drivers by netlink, without which there is no device to
// open (Linux 5.3), know all of it.
func contextRequest() abi.Mlx5AllocUcontextReqV2 {
	return abi.Mlx5AllocUcontextReqV2{
		TotalNumBFRegs: allRegs, NumLowLatencyBFRegs: dedicatedRegs, MaxCQEVersion: 1,
		LibCaps: abi.MLX5_LIB_CAP_4K_UAR | abi.MLX5_LIB_CAP_DYN_UAR,
	}
}

// deviceInfo is what the kernel has said of the device, checked.
type deviceInfo struct {
	maxSend     uint32 // bytes of a send element
	maxRecv     uint32 // bytes of a receive element
	maxBlocks   uint32 // of a send queue
	maxSlots    uint32 // of a receive queue
	maxSRQSlots uint32 // of a shared receive queue
	ports       uint8
	byIndex     bool // completions name queue pairs by the index that they were made with, not by number
	halfReg     int  // bytes of half a doorbell register; 0: there is no BlueFlame
	uarsPerPage int
	fixedRegs   int  // that the kernel hands out; 0: the process does
	tellsMAC    bool // when an address handle is made
	minInline   int  // bytes at the beginning of a frame that requests must have inline
}

// learn checks what the kernel has answered. Sizes that the formats have no room for are cut down; what makes no sense is refused.
func learn(r *abi.Mlx5AllocUcontextResp) (*deviceInfo, error) {
	const known = 64 // what every kernel that can be here answers: up to num_uars_per_page
	bad := func(what string, v any, want string) (*deviceInfo, error) {
		return nil, fmt.Errorf("the kernel's mlx5 driver says %s = %v, which cannot be (%s)", what, v, want)
	}
	i := &deviceInfo{
		maxSend: min(uint32(r.MaxSQDescSz), maxUnits*unitBytes), maxRecv: min(uint32(r.MaxRQDescSz), 1<<15),
		maxBlocks: min(r.MaxSendWQEBB, maxQueueBlocks), maxSlots: min(r.MaxRecvWR, maxQueueBlocks),
		maxSRQSlots: min(r.MaxSRQRecvWR, maxQueueBlocks), byIndex: r.CQEVersion == 1,
		halfReg: int(r.BFRegSize / 2), uarsPerPage: int(r.NumUARsPerPage), fixedRegs: int(r.TotBFRegs),
		tellsMAC: r.CmdsSuppUHW&abi.MLX5_USER_CMDS_SUPP_UHW_CREATE_AH != 0,
	}
	if r.EthMinInline != abi.MLX5_USER_INLINE_MODE_NONE { // of kernels that do not say, too
		i.minInline = frameInline
	}
	if r.ResponseLength > uint32(len(uverbs.Bytes(r))) || r.ResponseLength < known {
		return bad("response_length", r.ResponseLength, "64 to 72")
	}
	if r.LogUARSize == 0 && r.NumUARsPerPage == 0 { // a kernel that does not know UARs of 4 KiB
		i.uarsPerPage = 1
	} else if r.LogUARSize != 12 && r.LogUARSize != uint32(bits.TrailingZeros(uint(pageBytes))) {
		return bad("log_uar_size", r.LogUARSize, "12, or that of a page")
	}
	perUAR := usablePerUAR * i.uarsPerPage
	power := func(n uint32) bool { return bits.OnesCount32(n) == 1 } // queues have so many elements, and these are counted with masks
	switch {
	case i.maxSend < bindBytes || r.MaxSQDescSz%unitBytes != 0:
		return bad("max_sq_desc_sz", r.MaxSQDescSz, fmt.Sprintf("at least %d, in units of %d", bindBytes, unitBytes))
	case i.maxRecv < dataBytes || r.MaxRQDescSz%unitBytes != 0:
		return bad("max_rq_desc_sz", r.MaxRQDescSz, fmt.Sprintf("at least %d, in units of %d", dataBytes, unitBytes))
	case i.maxBlocks < bindBytes/blockBytes || !power(r.MaxSendWQEBB):
		return bad("max_send_wqebb", r.MaxSendWQEBB, "a power of two from 4 on")
	case !power(r.MaxRecvWR):
		return bad("max_recv_wr", r.MaxRecvWR, "a power of two")
	case r.MaxSRQRecvWR != 0 && !power(r.MaxSRQRecvWR):
		return bad("max_srq_recv_wr", r.MaxSRQRecvWR, "0, or a power of two")
	case r.NumPorts == 0:
		return bad("num_ports", r.NumPorts, "1 or more")
	case r.CQEVersion > 1:
		return bad("cqe_version", r.CQEVersion, "0 or 1: no more was asked for")
	case r.BFRegSize != 0 && (!power(r.BFRegSize) || i.halfReg < blockBytes || sendRegister+regsPerUAR*int64(r.BFRegSize) > uarBytes):
		return bad("bf_reg_size", r.BFRegSize, "0, or 128, 256 or 512")
	case i.uarsPerPage < 1 || i.uarsPerPage > pageBytes/uarBytes || i.uarsPerPage&(i.uarsPerPage-1) != 0:
		return bad("num_uars_per_page", r.NumUARsPerPage, fmt.Sprintf("a power of two up to %d", pageBytes/uarBytes))
	case r.TotBFRegs > 512 || i.fixedRegs%perUAR != 0:
		return bad("tot_bfregs", r.TotBFRegs, fmt.Sprintf("up to 512, in units of %d", perUAR))
	}
	i.ports = uint8(min(r.NumPorts, 255)) // of a switch, some hundred virtual functions have one each
	return i, nil
}
