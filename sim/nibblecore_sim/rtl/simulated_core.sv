// Top of whole-network simulations: the core, and DRAM behind its AXI4 master. The bench drives clock, reset, the
// AXI4-Lite port and the memory's host door, and waits for the interrupt.

`default_nettype none

module simulated_core #(
    parameter BUS_BYTES = 8,
    parameter ADDR_BITS = 32,
    parameter CSR_ADDR_BITS = 9,
    parameter MEMORY_BYTES = 1 << 26,
    parameter LATENCY = 20
) (
    input wire clk,
    input wire rst,
    output wire irq,
    input wire [CSR_ADDR_BITS-1:0] s_axil_awaddr,
    input wire s_axil_awvalid,
    output wire s_axil_awready,
    input wire [31:0] s_axil_wdata,
    input wire s_axil_wvalid,
    output wire s_axil_wready,
    output wire [1:0] s_axil_bresp,
    output wire s_axil_bvalid,
    input wire s_axil_bready,
    input wire [CSR_ADDR_BITS-1:0] s_axil_araddr,
    input wire s_axil_arvalid,
    output wire s_axil_arready,
    output wire [31:0] s_axil_rdata,
    output wire [1:0] s_axil_rresp,
    output wire s_axil_rvalid,
    input wire s_axil_rready,
    input wire [9:0] stall_permille,
    input wire [ADDR_BITS-1:0] error_first,
    input wire [ADDR_BITS-1:0] error_last,
    input wire [1:0] error_response,
    input wire host_write,
    input wire host_read,
    input wire [31:0] host_beat,
    input wire [31:0] host_count,
    output wire host_done,
    output wire [7:0] violation
);
    wire arid, arvalid, arready, rid, rlast, rvalid, rready;
    wire awid, awvalid, awready, wlast, wvalid, wready, bid, bvalid, bready;
    wire [ADDR_BITS-1:0] araddr, awaddr;
    wire [7:0] arlen, awlen;
    wire [2:0] arsize, awsize;
    wire [1:0] rresp, bresp;
    wire [8*BUS_BYTES-1:0] rdata, wdata;
    wire [BUS_BYTES-1:0] wstrb;

    nibblecore core (
        .clk(clk), .rst(rst), .irq(irq),
        .s_axil_awaddr(s_axil_awaddr), .s_axil_awprot(3'b000), .s_axil_awvalid(s_axil_awvalid),
        .s_axil_awready(s_axil_awready), .s_axil_wdata(s_axil_wdata), .s_axil_wstrb(4'hF),
        .s_axil_wvalid(s_axil_wvalid), .s_axil_wready(s_axil_wready), .s_axil_bresp(s_axil_bresp),
        .s_axil_bvalid(s_axil_bvalid), .s_axil_bready(s_axil_bready), .s_axil_araddr(s_axil_araddr),
        .s_axil_arprot(3'b000), .s_axil_arvalid(s_axil_arvalid), .s_axil_arready(s_axil_arready),
        .s_axil_rdata(s_axil_rdata), .s_axil_rresp(s_axil_rresp), .s_axil_rvalid(s_axil_rvalid),
        .s_axil_rready(s_axil_rready),
        .m_axi_arid(arid), .m_axi_araddr(araddr), .m_axi_arlen(arlen), .m_axi_arsize(arsize), .m_axi_arburst(),
        .m_axi_arlock(), .m_axi_arcache(), .m_axi_arprot(), .m_axi_arvalid(arvalid), .m_axi_arready(arready),
        .m_axi_rid(rid), .m_axi_rdata(rdata), .m_axi_rresp(rresp), .m_axi_rlast(rlast), .m_axi_rvalid(rvalid),
        .m_axi_rready(rready),
        .m_axi_awid(awid), .m_axi_awaddr(awaddr), .m_axi_awlen(awlen), .m_axi_awsize(awsize), .m_axi_awburst(),
        .m_axi_awlock(), .m_axi_awcache(), .m_axi_awprot(), .m_axi_awvalid(awvalid), .m_axi_awready(awready),
        .m_axi_wdata(wdata), .m_axi_wstrb(wstrb), .m_axi_wlast(wlast), .m_axi_wvalid(wvalid), .m_axi_wready(wready),
        .m_axi_bid(bid), .m_axi_bresp(bresp), .m_axi_bvalid(bvalid), .m_axi_bready(bready)
    );

    axi_memory #(
        .BUS_BYTES(BUS_BYTES), .ADDR_BITS(ADDR_BITS), .MEMORY_BYTES(MEMORY_BYTES), .LATENCY(LATENCY)
    ) memory (
        .clk(clk), .rst(rst), .stall_permille(stall_permille), .error_first(error_first), .error_last(error_last),
        .error_response(error_response), .host_write(host_write), .host_read(host_read), .host_beat(host_beat),
        .host_count(host_count), .host_done(host_done),
        .arid(arid), .araddr(araddr), .arlen(arlen), .arsize(arsize), .arvalid(arvalid), .arready(arready),
        .rid(rid), .rdata(rdata), .rresp(rresp), .rlast(rlast), .rvalid(rvalid), .rready(rready),
        .awid(awid), .awaddr(awaddr), .awlen(awlen), .awsize(awsize), .awvalid(awvalid), .awready(awready),
        .wdata(wdata), .wstrb(wstrb), .wlast(wlast), .wvalid(wvalid), .wready(wready),
        .bid(bid), .bresp(bresp), .bvalid(bvalid), .bready(bready), .violation(violation)
    );
endmodule

`default_nettype wire
