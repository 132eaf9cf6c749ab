package main

// goFile says what one Go file of internal/abi holds.
type goFile struct {
	name    string
	about   string   // the sentence at its head
	headers []string // whose constants it takes
	consts  []string // prefixes of the enumerators and macros to take; nothing else of the headers is
	structs []naming
}

// naming lists C structs, and gives their Go names: strip is taken away from the front of the C name, prefix put before
// what is left. An entry of the form c=Go names a struct for which that rule gives no good name.
type naming struct {
	strip, prefix string
	c             string // separated by white space
}

// wanted is the package: what the command and data path of ringside's providers use. The kernel has more (RSS,
// DEVX); what a provider comes to need is added here.
var wanted = []goFile{
	{
		name:    "verbs.go",
		about:   "The commands of /dev/infiniband/uverbsN: numbers, requests and responses.",
		headers: []string{"rdma/ib_user_verbs.h"},
		consts:  []string{"IB_USER_VERBS_", "IB_UVERBS_", "IB_DEVICE_NAME_MAX"},
		structs: []naming{{"ib_uverbs_", "", `
			ib_uverbs_cmd_hdr ib_uverbs_ex_cmd_hdr
			ib_uverbs_async_event_desc ib_uverbs_comp_event_desc
			ib_uverbs_get_context ib_uverbs_get_context_resp
			ib_uverbs_query_device ib_uverbs_query_device_resp
			ib_uverbs_ex_query_device ib_uverbs_ex_query_device_resp
			ib_uverbs_odp_caps ib_uverbs_rss_caps ib_uverbs_tm_caps ib_uverbs_cq_moderation_caps
			ib_uverbs_query_port ib_uverbs_query_port_resp
			ib_uverbs_alloc_pd ib_uverbs_alloc_pd_resp ib_uverbs_dealloc_pd
			ib_uverbs_open_xrcd ib_uverbs_open_xrcd_resp ib_uverbs_close_xrcd
			ib_uverbs_reg_mr ib_uverbs_reg_mr_resp ib_uverbs_rereg_mr ib_uverbs_rereg_mr_resp ib_uverbs_dereg_mr
			ib_uverbs_alloc_mw ib_uverbs_alloc_mw_resp ib_uverbs_dealloc_mw
			ib_uverbs_create_comp_channel ib_uverbs_create_comp_channel_resp
			ib_uverbs_create_cq ib_uverbs_create_cq_resp ib_uverbs_ex_create_cq ib_uverbs_ex_create_cq_resp
			ib_uverbs_resize_cq ib_uverbs_resize_cq_resp
			ib_uverbs_cq_moderation ib_uverbs_ex_modify_cq
			ib_uverbs_poll_cq ib_uverbs_poll_cq_resp ib_uverbs_wc ib_uverbs_req_notify_cq
			ib_uverbs_destroy_cq ib_uverbs_destroy_cq_resp
			ib_uverbs_global_route ib_uverbs_ah_attr ib_uverbs_qp_attr ib_uverbs_qp_dest
			ib_uverbs_create_qp ib_uverbs_create_qp_resp ib_uverbs_ex_create_qp ib_uverbs_ex_create_qp_resp
			ib_uverbs_open_qp
			ib_uverbs_query_qp ib_uverbs_query_qp_resp
			ib_uverbs_modify_qp ib_uverbs_ex_modify_qp ib_uverbs_ex_modify_qp_resp
			ib_uverbs_destroy_qp ib_uverbs_destroy_qp_resp
			ib_uverbs_sge
			ib_uverbs_send_wr ib_uverbs_post_send ib_uverbs_post_send_resp
			ib_uverbs_recv_wr ib_uverbs_post_recv ib_uverbs_post_recv_resp
			ib_uverbs_post_srq_recv ib_uverbs_post_srq_recv_resp
			ib_uverbs_create_ah ib_uverbs_create_ah_resp ib_uverbs_destroy_ah
			ib_uverbs_attach_mcast ib_uverbs_detach_mcast
			ib_uverbs_flow_attr ib_uverbs_create_flow ib_uverbs_create_flow_resp ib_uverbs_destroy_flow
			ib_uverbs_create_srq ib_uverbs_create_xsrq ib_uverbs_create_srq_resp
			ib_uverbs_modify_srq ib_uverbs_query_srq ib_uverbs_query_srq_resp
			ib_uverbs_destroy_srq ib_uverbs_destroy_srq_resp`}},
	},
	{
		name:    "ioctl.go",
		about:   "The ioctl door to the same commands: objects, methods and attributes.",
		headers: []string{"rdma/rdma_user_ioctl_cmds.h", "rdma/ib_user_ioctl_cmds.h", "rdma/ib_user_ioctl_verbs.h"},
		consts:  []string{"RDMA_IOCTL_MAGIC", "RDMA_VERBS_IOCTL", "UVERBS_", "IB_UVERBS_", "RDMA_DRIVER_"},
		structs: []naming{{"ib_uverbs_", "", `
			ib_uverbs_ioctl_hdr ib_uverbs_attr=IoctlAttr
			ib_uverbs_query_port_resp_ex ib_uverbs_qp_cap ib_uverbs_gid_entry`}},
	},
	{
		name:    "rxe.go",
		about:   "Soft RoCE: the queues that are shared with the driver, and what it adds to commands.",
		headers: []string{"rdma/rdma_user_rxe.h"},
		consts:  []string{"RXE_"},
		structs: []naming{{"rxe_", "Rxe", `
			rxe_queue_buf rxe_send_wqe rxe_send_wr rxe_recv_wqe rxe_dma_info rxe_sge rxe_av rxe_global_route
			mminfo=RxeMmapInfo
			rxe_create_ah_resp rxe_create_cq_resp rxe_resize_cq_resp rxe_create_qp_resp rxe_create_srq_resp
			rxe_modify_srq_cmd`}},
	},
	{
		name:    "siw.go",
		about:   "Soft iWARP: the queues that are shared with the driver, and what it adds to commands.",
		headers: []string{"rdma/siw-abi.h"},
		consts:  []string{"SIW_"},
		structs: []naming{{"siw_", "Siw", `
			siw_sqe siw_rqe siw_cqe siw_sge siw_cq_ctrl
			siw_uresp_alloc_ctx siw_uresp_create_cq siw_uresp_create_qp siw_uresp_create_srq
			siw_ureq_reg_mr siw_uresp_reg_mr`}},
	},
	{
		name:    "mlx5.go",
		about:   "mlx5: what the driver adds to commands. The queues themselves are the device's, and not part of the kernel's headers.",
		headers: []string{"rdma/mlx5-abi.h", "rdma/mlx5_user_ioctl_cmds.h", "rdma/mlx5_user_ioctl_verbs.h"},
		consts: []string{
			"MLX5_IB_UVERBS_ABI_VERSION", "MLX5_QP_FLAG_", "MLX5_SRQ_FLAG_", "MLX5_LIB_CAP_",
			"MLX5_IB_ALLOC_UCTX_", "MLX5_IB_ALLOC_UCONTEXT_", "MLX5_USER_CMDS_SUPP_", "MLX5_USER_INLINE_MODE_",
			"MLX5_IB_CQE_RES_FORMAT_", "MLX5_IB_QUERY_DEV_RESP_", "MLX5_IB_CREATE_CQ_FLAGS_",
			"MLX5_IB_CREATE_QP_RESP_MASK_", "MLX5_IB_MMAP_", "MLX5_IB_CLOCK_INFO_",
			"MLX5_IB_OBJECT_", "MLX5_IB_METHOD_UAR_OBJ_", "MLX5_IB_ATTR_UAR_OBJ_", "MLX5_IB_UAPI_UAR_ALLOC_TYPE_",
			"MLX5_IB_METHOD_PD_QUERY", "MLX5_IB_ATTR_QUERY_PD_", "MLX5_IB_ATTR_QUERY_CONTEXT_",
		},
		structs: []naming{{"mlx5_ib_", "Mlx5", `
			mlx5_ib_alloc_ucontext_req mlx5_ib_alloc_ucontext_req_v2 mlx5_ib_alloc_ucontext_resp
			mlx5_ib_alloc_pd_resp
			mlx5_ib_query_device_resp mlx5_ib_tso_caps mlx5_ib_rss_caps mlx5_ib_cqe_comp_caps
			mlx5_packet_pacing_caps=Mlx5PacketPacingCaps mlx5_ib_sw_parsing_caps mlx5_ib_striding_rq_caps
			mlx5_ib_dci_streams_caps
			mlx5_ib_create_cq mlx5_ib_create_cq_resp mlx5_ib_resize_cq
			mlx5_ib_create_srq mlx5_ib_create_srq_resp
			mlx5_ib_create_qp mlx5_ib_create_qp_dci_streams mlx5_ib_create_qp_resp
			mlx5_ib_modify_qp mlx5_ib_burst_info mlx5_ib_modify_qp_resp
			mlx5_ib_alloc_mw mlx5_ib_create_ah_resp mlx5_ib_clock_info`}},
	},
	{
		name:    "cm.go",
		about:   "The connection manager, /dev/infiniband/rdma_cm, and the socket addresses that it takes.",
		headers: []string{"rdma/rdma_user_cm.h", "rdma/ib_user_sa.h"},
		consts:  []string{"RDMA_USER_CM_", "RDMA_MAX_PRIVATE_DATA", "RDMA_PS_", "RDMA_MC_JOIN_", "RDMA_OPTION_", "IB_PATH_"},
		structs: []naming{
			{"rdma_ucm_", "CM", `
				rdma_ucm_cmd_hdr rdma_ucm_create_id rdma_ucm_create_id_resp rdma_ucm_destroy_id rdma_ucm_destroy_id_resp
				rdma_ucm_bind_ip rdma_ucm_resolve_ip rdma_ucm_bind rdma_ucm_resolve_addr rdma_ucm_resolve_route
				rdma_ucm_query rdma_ucm_query_route_resp rdma_ucm_query_addr_resp rdma_ucm_query_path_resp
				rdma_ucm_conn_param rdma_ucm_ud_param rdma_ucm_ece
				rdma_ucm_connect rdma_ucm_listen rdma_ucm_accept rdma_ucm_reject rdma_ucm_disconnect
				rdma_ucm_init_qp_attr rdma_ucm_notify rdma_ucm_join_mcast
				rdma_ucm_get_event rdma_ucm_event_resp rdma_ucm_set_option
				rdma_ucm_migrate_id rdma_ucm_migrate_resp`},
			{"ib_", "", `ib_user_path_rec ib_path_rec_data`},
			{"", "", `in_addr in6_addr sockaddr_in sockaddr_in6 __kernel_sockaddr_storage=SockaddrStorage`},
		},
	},
	{
		name:    "nldev.go",
		about:   "RDMA netlink, client RDMA_NL_NLDEV: devices, ports and links. A message's type is client<<10 | command.",
		headers: []string{"rdma/rdma_netlink.h"},
		consts:  []string{"RDMA_NL_NLDEV", "RDMA_NLDEV_", "RDMA_NODE_"},
	},
}

// asBytes are fields that become plain bytes, with the alignment kept: addresses and GIDs are byte strings to a user of
// them, whatever unions or words the kernel sees in them.
var asBytes = map[string]bool{
	"in6_addr.in6_u":          true,
	"rxe_global_route.dgid":   true,
	"ib_uverbs_gid_entry.gid": true,
}
